"""Ways to corrupt a file: each function changes its bytes, at random.

hypothesis draws the `random.Random` that makes every choice, so that it can shrink a case that fails.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from common.fileio import append_checksum

FOLDER = b"a folder in place of the file"  # compared by identity
CELLS = ("", " ", "NaN", "nan", "inf", "-inf", "-1", "0", "1", "2", "0.5", "7.0", "1.44E+12", "1e5", "9007199254740991",
         "9007199254740992", "-9007199254740991", "99999999999999999999", "1e308", "1e-320", "1e999", "True", "false",
         "NULL", "null", "None", "N/A", "x", "é", "١", "1_0", "0x10", "+5", " 7 ", "7\v", "=1+1", 'a"b', "\0", "-0",
         "view ", "VIEW", "2018-01-01", "9999999999999", "a" * 300, "\u2028", "\x1b[31m")
VALUES: tuple[Any, ...] = (None, True, False, 0, 1, -1, 2, 1.5, 10**12, -(10**20), float("nan"), float("inf"), "", "x",
                           "é", "../train.csv", "/etc/passwd", "a\nb", "\0", "$x$", "a" * 300, [], {}, [1], ["785"],
                           {"a": {}}, "\ud800")

Random = random.Random


# --------------------------------------------------------------------------------------------------------------- bytes


def flip(rng: Random, content: bytes) -> bytes:
    """Up to four bits."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(rng: Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def zero(rng: Random, content: bytes) -> bytes:
    """A block of zeros, as a disk with a lost page has."""
    start, size = rng.randrange(len(content) + 1), rng.choice((1, 4, 64, 512))
    return content[:start] + bytes(len(content[start:start + size])) + content[start + size:]


def lose(rng: Random, content: bytes) -> bytes:
    start = rng.randrange(len(content) + 1)
    return content[:start] + content[start + rng.choice((1, 2, 30, 500)):]


def repeat(rng: Random, content: bytes) -> bytes:
    start = rng.randrange(len(content) + 1)
    stop = start + rng.choice((1, 2, 30, 500))
    return content[:stop] + content[start:]


def insert(rng: Random, content: bytes) -> bytes:
    start = rng.randrange(len(content) + 1)
    what = rng.choice((b"\0", b"\n", b"\r", b"\r\n", b'"', b",", b"\xff", b"\xef\xbb\xbf", b"\x1a", b"garbage", b" "))
    return content[:start] + what + content[start:]


def replace(rng: Random, content: bytes) -> bytes:
    """Another content."""
    return rng.choice((b"", b"\n", b"\0" * 1000, b"<html><body>404</body></html>\n", b"{}", b"[]", b"a,b\n1,2\n",
                       gzip.compress(content, mtime=0), b"PK\x03\x04" + content, content[::-1], FOLDER))


BYTES: tuple[Callable[[Random, bytes], bytes], ...] = (flip, cut, zero, lose, repeat, insert, replace)


# -------------------------------------------------------------------------------------------------------------- tables


def corrupt_table(rng: Random, content: bytes) -> bytes:
    """Corrupt a CSV file without quotes."""
    how = rng.randrange(10)
    if how < 2:
        return rng.choice(BYTES)(rng, content)
    if how == 2:
        return encode(rng, content.decode())
    header, *rows = [line.split(",") for line in content.decode().splitlines()]
    rng.choice((cells, cells, cells, rows_, columns))(rng, header, rows)
    out = io.StringIO()
    csv.writer(out, lineterminator="\n", quoting=rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))).writerows(
        [header, *rows])
    text = out.getvalue()
    return encode(rng, text) if rng.randrange(4) == 0 else text.encode()


def cells(rng: Random, header: list[str], rows: list[list[str]]) -> None:
    """Other content in a few cells; or in a whole column."""
    for _ in range(rng.randint(1, 3)):
        column, cell = rng.randrange(len(header)), rng.choice(CELLS)
        for row in rows if rng.randrange(8) == 0 else [rng.choice(rows)]:
            if column < len(row):
                row[column] = cell


def rows_(rng: Random, header: list[str], rows: list[list[str]]) -> None:
    at = rng.randrange(len(rows))
    how = rng.randrange(8)
    if how == 0:
        rng.shuffle(rows)
    elif how == 1:
        rows.insert(at, list(rng.choice(rows)))
    elif how == 2:
        del rows[at:]
    elif how == 3:
        del rows[at:at + rng.choice((1, 5, 50))]
    elif how == 4:
        rows[at].pop()
    elif how == 5:
        rows[at].append(rng.choice(CELLS))
    elif how == 6:
        rows.insert(at, rng.choice(([], [" "], [""], ["", ""], list(header))))
    else:  # one cell moves to another row: as many commas as before
        rows[at].append(rng.choice(rows).pop())


def columns(rng: Random, header: list[str], rows: list[list[str]]) -> None:
    at = rng.randrange(len(header))
    how = rng.randrange(7)
    if how == 0:  # dropped
        for row in (header, *rows):
            del row[at]
    elif how == 1:  # renamed
        header[at] = rng.choice((header[at].upper(), header[at][:-1], " " + header[at], "", "\n", "x" * 500, "é"))
    elif how == 2:  # duplicated
        for row in (header, *rows):
            row.append(row[at])
    elif how == 3:  # duplicated under another name
        for row in rows:
            row.append(row[at])
        header.append(rng.choice(("further", "", "Unnamed: 3")))
    elif how == 4:  # reordered
        order = rng.sample(range(len(header)), len(header))
        for row in (header, *rows):
            row[:] = [row[number] for number in order]
    elif how == 5:  # two names exchanged
        other = rng.randrange(len(header))
        header[at], header[other] = header[other], header[at]
    else:  # another spelling of the same values
        for row in rows:
            if row[at].isdigit():
                row[at] = rng.choice((row[at] + ".0", " " + row[at], row[at] + " ", "+" + row[at], "0" + row[at]))


def encode(rng: Random, text: str) -> bytes:
    how = rng.randrange(10)
    if how == 0:
        return text.replace("\n", "\r\n").encode()
    if how == 1:
        return text.replace("\n", "\r").encode()
    if how == 2:
        return text.encode("utf-8-sig")
    if how == 3:
        return text.encode(rng.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32")))
    if how == 4:
        return text.replace("1", "é", 1).encode("latin-1", "replace")
    if how == 5:
        return text.replace("\n", "\n\n").encode()
    if how == 6:
        return text.rstrip("\n").encode()
    if how == 7:
        return gzip.compress(text.encode(), mtime=0)
    if how == 8:
        return text.replace("\n", "\n \t\n", 2).encode()
    return text.replace(",", ";").encode()


# ---------------------------------------------------------------------------------------------------------------- JSON


def corrupt_json(rng: Random, content: bytes) -> bytes:
    """Change the text, or one or two values of the object."""
    how = rng.randrange(10)
    if how < 3:
        return rng.choice(BYTES)(rng, content)
    if how == 3:
        return rng.choice((
            content.decode().encode(rng.choice(("utf-16", "utf-8-sig", "utf-32"))), b"[" * 100_000, b'{"a":' * 100_000,
            content.replace(b":", b": " + b"9" * 5000 + b", \"x\":", 1), content.replace(b"{", b'{"format": 1,', 2),
            b"[" + content + b"]", content.replace(b"\n", b"\r\n")))
    value = json.loads(content)
    for _ in range(rng.randint(1, 2)):
        change(rng, value)
    return json.dumps(value).encode()


def change(rng: Random, value: Any) -> None:
    """One change somewhere inside a value of lists and dictionaries."""
    places = [(holder, key) for holder in containers(value) for key in (holder if isinstance(holder, dict)
                                                                        else range(len(holder)))]
    if not places:
        return
    holder, key = rng.choice(places)
    how = rng.randrange(6)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[rng.choice([one for one in VALUES if isinstance(one, str)])] = holder.pop(key)
    elif how == 2 and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[key]))
    elif how == 3:
        other, place = rng.choice(places)
        if not any(one is other for one in containers(holder[key])):
            other[place] = copy.deepcopy(holder[key])
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))


def containers(value: Any) -> list[Any]:
    """All lists and dictionaries in a value, itself included."""
    found, waiting = [], [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list | dict):
            found.append(one)
            waiting += list(one.values() if isinstance(one, dict) else one)
    return found


# ------------------------------------------------------------------------------------------------------------ archives


def with_checksum(content: bytes, path: Any) -> bytes:
    """The bytes with a valid checksum, as an attacker writes them."""
    path.write_bytes(content)
    append_checksum(path)
    return path.read_bytes()



def corrupt_checkpoint(rng: Random, content: bytes, scratch: Any) -> bytes:
    """Change the bytes; or the values, with a valid checksum or without one."""
    how = rng.randrange(10)
    if how < 5:
        return rng.choice(BYTES)(rng, content)
    value = torch.load(io.BytesIO(content), weights_only=True)
    for _ in range(rng.randint(1, 2)):
        change_tensors(rng, value)
    out = io.BytesIO()
    with contextlib.suppress(UnicodeEncodeError):  # half a surrogate pair
        torch.save(value, out)
    return with_checksum(out.getvalue(), scratch) if how < 9 and out.getvalue() else out.getvalue()


def change_tensors(rng: Random, value: Any) -> None:
    places = [(holder, key) for holder in containers(value) for key in (holder if isinstance(holder, dict)
                                                                        else range(len(holder)))]
    tensors = [(one, name) for one, name in places if isinstance(one[name], torch.Tensor) and one[name].numel()]
    if rng.randrange(2) or not tensors:
        change(rng, value)
        return
    holder, key = rng.choice(tensors)
    tensor = holder[key].flatten()[:9].clone() if holder[key].numel() > 10**9 else holder[key].clone()
    holder[key] = rng.choice((
        lambda: tensor.double(), lambda: tensor.half(), lambda: tensor.to(torch.int64), lambda: tensor.to(torch.cfloat),
        lambda: tensor.flatten()[:1].expand(10**6, 10**6), lambda: tensor.to_sparse(), lambda: tensor.flatten()[:0],
        lambda: tensor.unsqueeze(0), lambda: tensor * float("nan"), lambda: tensor / 0, lambda: tensor.reshape(1, -1).T,
        lambda: tensor.to("meta"), lambda: tensor + 1))()


def corrupt_replay_buffer(rng: Random, content: bytes, scratch: Any) -> bytes:
    how = rng.randrange(10)
    if how < 5:
        return rng.choice(BYTES)(rng, content)
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays: dict[str, Any] = {name: file[name] for name in file.files}
    name = rng.choice(sorted(arrays))
    kind = rng.randrange(9)
    array = arrays[name]
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[rng.choice(("further", "../x", "state", "Done"))] = arrays.pop(name)
    elif kind == 2:
        arrays[name] = array.astype(rng.choice((np.float64, np.int64, np.float16, np.complex64, object, "S3")))
    elif kind == 3:
        arrays[name] = array[: rng.randrange(len(array) + 1)]
    elif kind == 4 and array.dtype == np.float32:
        array.flat[rng.randrange(array.size)] = rng.choice((np.nan, np.inf, -np.inf))
    elif kind == 5:
        arrays[name] = np.asfortranarray(array.reshape(len(array), -1))
    elif kind == 6:
        metadata = json.loads(arrays["identity"].tobytes())
        change(rng, metadata)
        arrays["identity"] = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    elif kind == 7:
        arrays["identity"] = np.frombuffer(rng.choice((b"", b"[]", b"[" * 100_000, b"\xff", b"1" * 5000)), np.uint8)
    else:
        arrays[name] = array.reshape(-1)
    out = io.BytesIO()
    (np.savez_compressed if rng.randrange(5) == 0 else np.savez)(out, **arrays)
    text = out.getvalue()
    if rng.randrange(6) == 0:  # an array that claims to be larger than it is
        text = text.replace(b"'shape': (", b"'shape': (9", 1)
    return with_checksum(text, scratch) if how < 9 else text
