"""Reading: a bad cell is named by file, line and column. Writing: whole or not at all. No pickle."""

from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import complaint
from hypothesis import given
from hypothesis import strategies as st

from common.checkpoint import load_tensors, save_tensors
from common.csv_reader import MAX_EXACT_INT, read_chunks, read_table
from common.errors import UserError, cli_entry_point
from common.fileio import atomic_file, atomic_folder, check_writable, read_json, sha256, write_json

COLUMNS: dict[str, Kind] = {"itemid": "id", "click": "label", "note": "optional_text"}
HEADER = "itemid,click,note\n"


def table_of(path: Path, content: str | bytes) -> pd.DataFrame:
    """Write the content and read it with `COLUMNS`."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path, COLUMNS)


# ----------------------------------------------------------------------------------------------------- what is refused

BAD_CELLS = {
    "NaN label": ("1,NaN,x\n", 2, "click"),
    "empty label": ("1,0,x\n2,,x\n", 3, "click"),
    "label 2": ("1,0,x\n2,1,x\n3,2,x\n", 4, "click"),
    "label one half": ("1,0.5,x\n", 2, "click"),
    "label in words": ("1,0,x\n2,yes,x\n", 3, "click"),
    "id in words": ("1,0,x\nmug,1,x\n", 3, "itemid"),
    "id with a fraction": ("1,0,x\n1.5,1,x\n", 3, "itemid"),
    "id with an underscore": ("1,0,x\n1_0,1,x\n", 3, "itemid"),
    "id in fullwidth digits": ("1,0,x\n\uff17,1,x\n", 3, "itemid"),
    "label behind a no-break space": ("1,0,x\n2,\u00a01,x\n", 3, "click"),
    "id missing": ("1,0,x\n,1,x\n", 3, "itemid"),
    "id infinite": ("inf,1,x\n", 2, "itemid"),
    "id of 2^53": (f"1,0,x\n{MAX_EXACT_INT},1,x\n", 3, "itemid"),
    "id above 2^53": ("9007199254740993,1,x\n", 2, "itemid"),
    "id below -2^53": ("-1e300,1,x\n", 2, "itemid"),
    "row too short": ("1,0,x\n2\n3,1,x\n", 3, "click"),
    "last line cut in a row": ("1,0,x\n2,1", 3, "note"),
    "last line cut after one digit": ("1,0,x\n2", 3, "click"),
    "row too long": ("1,0,x\n2,1,x,9\n", 3, "note"),
    "first row too long": ("1,0,x,9\n2,1,x\n", 2, "note"),
    "first row with one comma too many": ("1,0,x,\n2,1,x,\n", 2, "note"),
    "ids in words for truth": ("True,0,x\nFalse,1,x\n", 2, "itemid"),
    "labels in words for truth": ("1,True,x\n2,False,x\n", 2, "click"),
    "NUL bytes": ("1,0,x\n2,1,\0\0\n", 3, "note"),
    "an empty row of commas": ("1,0,x\n,,\n", 3, "itemid"),
    "bad cell below a cell of two lines": ('1,0,"a\nb"\n2,7,x\n', 4, "click"),
    "a row of two lines is named by its first": ('1,0,x\n2,7,"a\nb"\n', 3, "click"),
    "a quote that never ends": ('1,0,x\n2,1,"x\n3,0,y\n', 3, "note"),
    "a quoted blank": ('1,0,"x"\n" "\n2,1,y\n', 3, "click"),
    "a quoted nothing": ('1,0,"x"\n""\n2,1,y\n', 3, "click"),
    "an empty cell moved to the first row": ("1,0,x,\n2,1\n", 2, "note"),
    "a comma moved to another row": ("1,0\n2,1,x,9\n", 2, "note"),
    "bad cell below a blank line": ("1,0,x\n\n2,7,x\n", 4, "click"),
    "bad cell below a quoted comma": ('1,0,"a, b"\n2,7,x\n', 3, "click"),
    "short row below a quoted comma": ('1,0,"a, b"\n2\n', 3, "click"),
}


@pytest.mark.parametrize(("rows", "line", "column"), BAD_CELLS.values(), ids=BAD_CELLS.keys())
def test_a_bad_cell_is_named_by_file_line_and_column(tmp_path: Path, rows: str, line: int, column: str) -> None:
    path = tmp_path / "train.csv"
    text = complaint(lambda: table_of(path, HEADER + rows))
    assert text.startswith(f"{path}, line {line}, column '{column}': ")


def test_a_bad_cell_is_found_in_a_later_chunk(tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    path.write_text(HEADER + "1,0,x\n" * 25 + "1,2,x\n")
    text = complaint(lambda: list(read_chunks(path, COLUMNS, chunk_rows=10)))
    assert text.startswith(f"{path}, line 27, column 'click': ")


@given(rows=st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 1), st.sampled_from(["", "x", "1 n2.0"])),
                     min_size=1, max_size=30), data=st.data())
def test_one_bad_label_among_good_rows_is_found_wherever_it_is(tmp_path_factory: pytest.TempPathFactory,
                                                               rows: list[tuple[int, int, str]],
                                                               data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("table") / "test.csv"
    assert table_of(path, HEADER + "".join(f"{a},{b},{c}\n" for a, b, c in rows))["click"].tolist() == [
        b for _, b, _ in rows]
    at = data.draw(st.integers(0, len(rows) - 1))
    bad = data.draw(st.sampled_from(["nan", "2", "-1", "", "click", "1e9", "0.999"]))
    text = "".join(f"{a},{bad if row == at else b},{c}\n" for row, (a, b, c) in enumerate(rows))
    assert complaint(lambda: table_of(path, HEADER + text)).startswith(f"{path}, line {at + 2}, column 'click': ")


def test_a_byte_that_is_no_utf8_is_named_by_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    text = complaint(lambda: table_of(path, HEADER.encode() + b"1,0,x\n2,1,caf\xe9\n"))
    assert text.startswith(f"{path}, line 3, column 'note': not UTF-8 text")
    assert "line 1: not UTF-8" in complaint(lambda: table_of(path, b"itemid,cl\xefck,note\n1,0,x\n"))


def test_gzip_under_the_name_of_a_plain_file_is_told(tmp_path: Path) -> None:
    text = complaint(lambda: table_of(tmp_path / "a.csv", gzip.compress(HEADER.encode() + b"1,0,x\n")))
    assert "gzip: name it a.csv.gz" in text


@pytest.mark.parametrize("header", ['"item\nid",click,note', "itemid\x1b[31m,click,note", "x" * 5000 + ",click,note",
                                    "itemid\0,click,note"], ids=["two lines", "colours", "long", "NUL"])
def test_what_is_quoted_from_a_header_stays_one_line(tmp_path: Path, header: str) -> None:
    text = complaint(lambda: table_of(tmp_path / "a.csv", header + "\n1,0,x\n"))
    assert text.isprintable()
    assert len(text) < 700


def test_a_pipe_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    """It would be waited for without end."""
    os.mkfifo(tmp_path / "a")
    for read in (lambda path: read_table(path, COLUMNS), read_json, lambda path: load_tensors(path, "train it")):
        assert complaint(lambda read=read: read(tmp_path / "a")).startswith(f"{tmp_path / 'a'}: not a file")  # type: ignore[misc]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "absent.csv"
    assert complaint(lambda: read_table(path, COLUMNS)) == f"{path}: no such file"


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").mkdir()
    assert str(tmp_path / "train.csv") in complaint(lambda: read_table(tmp_path / "train.csv", COLUMNS))


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    text = complaint(lambda: table_of(tmp_path / "a.csv", "itemid,note\n1,x\n"))
    assert text.startswith(f"{tmp_path / 'a.csv'}, line 1: column 'click' is missing")
    assert "misspelt" not in text


def test_a_header_that_lost_a_comma_is_to_blame_and_not_the_rows(tmp_path: Path) -> None:
    assert "line 1: column 'itemid' is missing" in complaint(lambda: table_of(tmp_path / "a.csv", "itemid-click,note\n"
                                                                              "1,0,x\n"))


def test_a_misspelt_column_gets_a_hint(tmp_path: Path) -> None:
    text = complaint(lambda: table_of(tmp_path / "a.csv", "itemid,clik,note\n1,0,x\n"))
    assert "line 1" in text
    assert "column 'click' is missing" in text
    assert "is 'clik' misspelt?" in text
    (tmp_path / "a.csv").write_text("click_time\n5\n")
    text = complaint(lambda: read_table(tmp_path / "a.csv", {"click": "label", "click_time": "optional_id"}))
    assert text.endswith("(there are: click_time)"), "that column is one of its own"


def test_a_column_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    text = complaint(lambda: table_of(tmp_path / "a.csv", "itemid,click,note,click\n1,0,x,1\n"))
    assert "line 1: column 'click' stands there 2 times" in text


UNREADABLE = {
    "an empty file": (b"", "empty"),
    "only blank lines": (b"\n\n", "empty"),
    "only a header": (HEADER.encode(), "no rows"),
    "Latin-1": (HEADER.encode() + "1,0,café\n".encode("latin-1"), "UTF-8"),
    "Latin-1 far down": (HEADER.encode() + b"1,0,x\n" * 20_000 + "1,0,café\n".encode("latin-1"), "UTF-8"),
    "UTF-16": ((HEADER + "1,0,x\n").encode("utf-16"), "UTF-8"),
    "a quote that never ends": (HEADER.encode() + b'1,0,"x\n2,1,y\n', "a quote that is opened there never ends"),
}


@pytest.mark.parametrize(("content", "reason"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_file_that_is_no_table_is_refused_in_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "val.csv"
    text = complaint(lambda: table_of(path, content))
    assert text.startswith(str(path))
    assert reason in text


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_gzip_file_that_is_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    whole = gzip.compress((HEADER + "".join(f"{i * 7919 % 10007},{i % 2},x\n" for i in range(5_000))).encode())
    path = tmp_path / "events.csv.gz"
    text = complaint(lambda: table_of(path, whole[: int(len(whole) * share)]))
    assert text.startswith(str(path))


def test_a_gzip_name_with_plain_text_in_it_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path / "a.csv.gz") in complaint(lambda: table_of(tmp_path / "a.csv.gz", HEADER + "1,0,x\n"))


# ---------------------------------------------------------------------------------------------------- what is accepted


def test_kinds_come_with_their_types(tmp_path: Path) -> None:
    table = table_of(tmp_path / "a.csv", HEADER + "1,0,x\n2,1,\n")
    assert {name: str(kind) for name, kind in table.dtypes.items()} == {
        "itemid": "int64", "click": "float32", "note": table["note"].dtype.name}
    assert table["note"].tolist() == ["x", ""]


@pytest.mark.parametrize(("cell", "value"), [("12", 12), ("12.0", 12), ("1.44E+12", 1_440_000_000_000), ("-5", -5),
                                             ("1439399530012", 1_439_399_530_012), (str(MAX_EXACT_INT - 1), MAX_EXACT_INT - 1)])
def test_spellings_of_a_whole_number(tmp_path: Path, cell: str, value: int) -> None:
    assert table_of(tmp_path / "a.csv", HEADER + f"{cell},0,x\n")["itemid"].tolist() == [value]


PLAIN = HEADER + "1,0,x\n2,1,y\n"
SAME_TABLE = {
    "a byte order mark": PLAIN.encode("utf-8-sig"),
    "Windows line ends": PLAIN.replace("\n", "\r\n").encode(),
    "blank lines": PLAIN.replace("\n", "\n\n").encode(),
    "no last line end": PLAIN.rstrip().encode(),
    "quotes": PLAIN.replace("x", '"x"').encode(),
    "further columns": b"other,itemid,click,note\n9,1,0,x\nmug,2,1,y\n",
    "another order of columns": b"note,click,itemid\nx,0,1\ny,1,2\n",
}


@pytest.mark.parametrize("content", SAME_TABLE.values(), ids=SAME_TABLE.keys())
def test_spellings_of_the_same_table(tmp_path: Path, content: bytes) -> None:
    expected = {"itemid": [1, 2], "click": [0, 1], "note": ["x", "y"]}
    assert table_of(tmp_path / "a.csv", content).to_dict("list") == expected
    assert table_of(tmp_path / "a.csv.gz", gzip.compress(content)).to_dict("list") == expected


def test_cells_may_hold_commas_quotes_and_line_ends(tmp_path: Path) -> None:
    table = table_of(tmp_path / "a.csv", HEADER + '1,0,"a, b"\n2,1,"say ""hi"""\n3,0,"two\nlines"\n')
    assert table["note"].tolist() == ["a, b", 'say "hi"', "two\nlines"]


def test_repairs_are_counted_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text("itemid,parent\n1,\n\n2,NULL\n \t\n3,nan\n4, \n5,7\n")
    table = read_table(path, {"itemid": "id", "parent": "optional_id"})
    assert table["itemid"].tolist() == [1, 2, 3, 4, 5]
    assert table["parent"].isna().tolist() == [True, True, True, True, False]
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: repaired: 2 blank lines left out",
        f"{path}: repaired: 3 cells taken for empty that say NULL, NA or nan, or are blank"]
    path.write_text("itemid,parent\n1,\n2,7.5\n")
    assert complaint(lambda: read_table(path, {"itemid": "id", "parent": "optional_id"})).startswith(
        f"{path}, line 3, column 'parent': '7.5' is not a whole number")


def test_chunks_add_up_to_the_table(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    whole = table_of(path, HEADER + "".join(f"{i},{i % 2},v{i}\n" for i in range(25)))
    chunks = list(read_chunks(path, COLUMNS, chunk_rows=10))
    assert [len(chunk) for chunk in chunks] == [10, 10, 5]
    pd.testing.assert_frame_equal(pd.concat(chunks, ignore_index=True), whole)


def test_an_optional_column_may_be_absent_and_an_optional_id_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("itemid,parent\n1,\n2,7\n")
    table = read_table(path, {"itemid": "id", "parent": "optional_id", "click": "label"}, optional=["click"])
    assert list(table) == ["itemid", "parent"]
    assert table["parent"].isna().tolist() == [True, False]


# ------------------------------------------------------------------------------------------------------------- writing


def test_atomic_file_replaces_the_old_content_at_the_end_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_file(path) as partial:
        partial.write_text("old")
    with atomic_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["a.txt"]


def test_atomic_file_that_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with atomic_file(path) as partial:
            partial.write_text("half of the n")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_atomic_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "rt"
    with atomic_folder(path) as partial:
        (partial / "train.csv").write_text("x")
        assert not path.exists()
    assert os.listdir(tmp_path) == ["rt"]
    assert os.listdir(path) == ["train.csv"]


def test_atomic_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "rt") as partial:
            (partial / "train.csv").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert os.listdir(tmp_path) == []


def test_atomic_folder_never_replaces_one_that_holds_files(tmp_path: Path) -> None:
    kept = tmp_path / "rt" / "mine.csv"
    kept.parent.mkdir()
    kept.write_text("mine")

    def overwrite() -> None:
        with atomic_folder(tmp_path / "rt") as partial:
            (partial / "mine.csv").write_text("other")

    assert str(tmp_path / "rt") in complaint(overwrite)
    assert kept.read_text() == "mine"
    assert os.listdir(tmp_path) == ["rt"]


def test_a_file_in_the_way_of_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "chkpt").write_text("not a folder")
    text = complaint(lambda: check_writable(tmp_path / "chkpt" / "SL"))
    assert str(tmp_path / "chkpt") in text
    assert "cannot be written" in text


def test_check_writable_makes_the_folders_and_leaves_them_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", tmp_path / "c")
    assert os.listdir(tmp_path / "a" / "b") == []
    assert os.listdir(tmp_path / "c") == []


def test_json_there_and_back(tmp_path: Path) -> None:
    value = {"command": "python3 SLmain.py", "π": [1, 2.5, None]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1,}', b"[1, 2]", b"12", b"\xff\xfe", b"[" * 100_000,
                                     b'{"a": ' + b"9" * 5000 + b"}", b'{"a": 1, "a": 2}', b'{"a": "\\ud800"}'],
                         ids=["empty", "cut", "comma", "list", "number", "bytes", "deep", "digits", "twice", "half"])
def test_bad_json_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    assert str(path) in complaint(lambda: read_json(path))


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_program_ends_with_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise UserError("a.csv, line 2: bad")

    with pytest.raises(SystemExit) as stopped:
        cli_entry_point(main)()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: a.csv, line 2: bad\n"


# ----------------------------------------------------------------------------------------------------------- no pickle


class Malicious:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_the_malicious_pickle_works_where_pickle_is_used(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malicious(tmp_path / "owned")))
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_in_place_of_a_checkpoint_runs_nothing(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "plain.pt"
    path.write_bytes(pickle.dumps({"weights": Malicious(tmp_path / "owned")}, protocol))
    text = complaint(lambda: load_tensors(path, "train it again"))
    assert text.startswith(str(path))
    assert text.endswith("train it again")
    assert not (tmp_path / "owned").exists()


def test_a_pickle_inside_a_checkpoint_runs_nothing(tmp_path: Path) -> None:
    torch.save({"weights": Malicious(tmp_path / "owned")}, tmp_path / "inside.pt")
    assert str(tmp_path / "inside.pt") in complaint(lambda: load_tensors(tmp_path / "inside.pt", "train it again"))
    assert not (tmp_path / "owned").exists()


def test_one_changed_byte_anywhere_is_noticed(tmp_path: Path) -> None:
    """In weights, in the parts that only torch looks at, in the checksum itself."""
    path = tmp_path / "state.pt"
    save_tensors(path, {"model": {"weight": torch.arange(20.0)}})
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        assert complaint(lambda: load_tensors(path, "train it again")).endswith(": train it again")
    path.write_bytes(whole)
    load_tensors(path, "")


def test_a_checkpoint_without_a_checksum_is_refused_with_the_remedy(tmp_path: Path) -> None:
    torch.save({"weights": {"a": torch.ones(2)}}, tmp_path / "old.pt")
    text = complaint(lambda: load_tensors(tmp_path / "old.pt", "train it again"))
    assert "without a checksum: damaged, or of an earlier version: train it again" in text


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_checkpoint_with_numbers_that_are_not_finite_is_refused(tmp_path: Path, bad: float) -> None:
    save_tensors(tmp_path / "a.pt", {"weights": {"a": torch.tensor([1.0, bad])}})
    assert "not a checkpoint" in complaint(lambda: load_tensors(tmp_path / "a.pt", "train it again"))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 0.99])
def test_a_checkpoint_that_is_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "state.pt"
    save_tensors(path, {"model": {"weight": torch.arange(1_000.0)}})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert str(path) in complaint(lambda: load_tensors(path, "run without --resume"))


def test_tensors_there_and_back(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.pt", {"x": torch.arange(3), "names": ["a", "b"], "epoch": 2})
    read = load_tensors(tmp_path / "a.pt", "")
    assert torch.equal(read.pop("x"), torch.arange(3))
    assert read == {"names": ["a", "b"], "epoch": 2}
    assert "no such file" in complaint(lambda: load_tensors(tmp_path / "absent.pt", "train it"))


# -------------------------------------------------------------------------------------------------------------- memory


def test_what_does_not_fit_is_refused_with_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  9999 kB\nMemAvailable:  3145728 kB\n")
    monkeypatch.setattr(files, "PROC", tmp_path)
    monkeypatch.setattr(files, "CGROUP", tmp_path)
    files.require_free_memory(2.9 * 2**30, "big")
    text = complaint(lambda: files.require_free_memory(3.5 * 2**30, "big"))
    assert text.startswith("big: about 3.5 GiB of memory are needed, 3.0 GiB are free:")
    (tmp_path / "memory.max").write_text("2147483648\n")
    (tmp_path / "memory.current").write_text("1610612736\n")
    (tmp_path / "memory.stat").write_text("anon 1\nfile 536870912\n")
    assert "1.0 GiB are free" in complaint(lambda: files.require_free_memory(3.5 * 2**30, "big"))
    (tmp_path / "memory.max").write_text("max\n")
    assert "3.0 GiB are free" in complaint(lambda: files.require_free_memory(3.5 * 2**30, "big"))


def test_where_nothing_is_known_of_memory_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PROC", tmp_path)
    monkeypatch.setattr(files, "CGROUP", tmp_path)
    files.require_free_memory(2**60, "big")


def test_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a\n" * 700_000 + b"b")
    assert files.count_lines(tmp_path / "a.csv") == 700_000
