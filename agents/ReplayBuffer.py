"""The replay buffer: transitions [state, action, next_state, reward, done, label]."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.fileio import append_checksum, atomic_file, open_verified, require_free_memory

Floats = NDArray[np.float32]
Transition = dict[str, NDArray[Any]]
VERSION = 2
BLOCK_ROWS = 16_384  # that are read from a file at once
HINT = "run RLmain.py with --refill to fill a new one"


class ReplayBuffer:
    """A ring buffer of the last `size` transitions, in memory once.

    Args:
        state_dim: S, length of a state.
        action_dim: T, length of an action; rewards and labels are as long.
        size: how many transitions are kept; the oldest go first.
        batch_size: B of `sample_batch`.
        seed: of the sampling; `reseed` gives a new one.

    Raises UserError where it would not fit into memory: states that are windows are `window` times as long.
    """

    def __init__(self, state_dim: int, action_dim: int, size: int, batch_size: int, seed: int = 0) -> None:
        widths = {"state": state_dim, "action": action_dim, "next_state": state_dim, "reward": action_dim,
                  "label": action_dim}
        width = sum(widths.values()) + 1
        require_free_memory(4 * size * width, f"a replay buffer of {size:,} transitions of {4 * width} bytes")
        # One row a transition, so that a batch is one gather; `data` names its columns.
        self.storage: Floats = np.zeros((size, width), np.float32)
        ends = np.cumsum(list(widths.values()))
        self.slices = {name: slice(end - width, end) for (name, width), end in zip(widths.items(), ends, strict=True)}
        self.data = self._split_columns(self.storage)
        self.max_size, self.batch_size = size, batch_size
        self.ptr, self.size, self.total_added = 0, 0, 0  # where the next one goes; how many there are; ever were
        self.reseed(seed)

    def reseed(self, *seed: int) -> None:
        """Restart the random numbers of `sample_batch`."""
        self.rng = np.random.default_rng(list(seed))

    def store(self, state: Any, action: Any, next_state: Any = None, reward: Any = None, done: Any = None,
              label: Any = None, *, nstate: Any = None) -> None:
        """Store one transition, or many with a leading axis: states (n, S), actions (n, T), done (n,), ...

        nstate: the next state by its published name.

        Raises UserError for NaN or infinity, which would become a NaN loss much later. ValueError where
        a part of the transition is missing, or of another width than the buffer's.
        """
        given = {"state": state, "action": action, "next_state": nstate if next_state is None else next_state,
                 "reward": reward, "label": label}
        missing = [name for name, value in {**given, "done": done}.items() if value is None]
        if missing:
            raise ValueError(f"replay buffer: a transition without '{missing[0]}'")
        rows = {name: np.atleast_2d(np.asarray(value, np.float32))[-self.max_size:] for name, value in given.items()}
        for name, value in rows.items():
            if value.shape[1] != self.data[name].shape[1]:
                raise ValueError(f"replay buffer: '{name}' has {value.shape[1]} numbers a transition, not "
                                 f"{self.data[name].shape[1]}")
            if not np.isfinite(value).all():
                row, column = np.argwhere(~np.isfinite(value))[0]
                where = f"column {column}" if name.endswith("state") else f"task {column}"
                raise UserError(f"replay buffer: the {name} of transition {self.total_added + row}, {where}, is "
                                f"{value[row, column]}: it is not stored, and nothing is trained on it")
        rows["done"] = np.atleast_1d(np.asarray(done, np.float32))[-self.max_size:]
        if len({len(value) for value in rows.values()}) > 1:
            raise ValueError("replay buffer: " + ", ".join(f"{len(value)} of '{name}'" for name, value in rows.items())
                             + ": one of each is needed for every transition")
        at = (self.ptr + np.arange(len(rows["done"]))) % self.max_size
        for name, value in rows.items():
            self.data[name][at] = value
        self.ptr = (self.ptr + len(at)) % self.max_size
        self.size = min(self.size + len(at), self.max_size)
        self.total_added += len(at)

    def sample_batch(self) -> Transition:
        """Draw `batch_size` different transitions (all of them, if there are fewer), uniformly; "index" (B,) contains
        which they are."""
        if not self.size:
            raise UserError("the replay buffer is empty: fill it first, with train.run.one_iter_offline(agent) or with "
                            "memory.store(...)")
        index = self.rng.choice(self.size, min(self.batch_size, self.size), replace=False, shuffle=False)
        return {**self._split_columns(self.storage[index]), "index": index}

    def clear(self) -> None:
        """Forget all transitions."""
        self.ptr, self.size = 0, 0

    def _split_columns(self, rows: Floats) -> Transition:
        return {**{name: rows[:, columns] for name, columns in self.slices.items()}, "done": rows[:, -1]}

    def __len__(self) -> int:
        return self.size

    def save(self, path: str | Path, metadata: Mapping[str, Any]) -> None:
        """Write `.npz`, with its metadata (data, reward type, actor, ...) and its checksum."""
        path = Path(path)
        stored = {name: values[: self.size] for name, values in self.data.items()}
        text = json.dumps({"version": VERSION, "next": self.ptr, **metadata})
        with atomic_file(path) as partial:
            with open(partial, "wb") as file:
                np.savez(file, identity=np.frombuffer(text.encode(), np.uint8), **stored)  # type: ignore[arg-type]
            append_checksum(partial)

    def load(self, path: str | Path, metadata: Mapping[str, Any]) -> None:
        """Read what `save` wrote, block by block. Raises UserError where it is damaged or has other metadata."""
        path = Path(path)
        with open_verified(path, HINT) as file, zipfile.ZipFile(file) as archive:
            try:
                with _open_npy_member(archive, "identity", np.uint8) as (member, _):
                    saved = json.loads(member.read())
                with _open_npy_member(archive, "done", np.float32) as (_, shape):
                    (count,) = shape
                ptr = self._check_metadata(path, saved if isinstance(saved, dict) else {}, metadata, count)
                for is_checked in (False, True):  # nothing of a damaged file is taken over
                    for name, values in self.data.items():
                        with _open_npy_member(archive, name, np.float32) as (member, shape):
                            is_valid = shape == (count, *values.shape[1:])
                            for start in range(0, count if is_valid else 0, BLOCK_ROWS):
                                rows = values[start:min(count, start + BLOCK_ROWS)]
                                read = np.frombuffer(member.read(4 * rows.size), np.float32).reshape(rows.shape)
                                is_valid &= bool(np.isfinite(read).all())
                                if is_checked:
                                    rows[:] = read
                        if not is_valid:
                            raise UserError(f"{path}: '{name}' has the wrong shape or numbers that are not finite: "
                                            f"{HINT}")
            except (OSError, RuntimeError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                reason = type(error).__name__
                raise UserError(f"{path}: not a replay buffer that can be read ({reason}): {HINT}") from error
        self.size, self.ptr = count, ptr % self.max_size
        self.total_added += count

    def _check_metadata(self, path: Path, saved: Mapping[str, Any], metadata: Mapping[str, Any], count: int) -> int:
        """The place of the next transition. Raises UserError where a file of `count` transitions does not fit."""
        for name, value in {"version": VERSION, **metadata}.items():
            if saved.get(name) != value:
                what = "data set" if name == "data" else name.replace("_", " ")
                raise UserError(f"{path}: replay buffer metadata mismatch: its {what} is {saved.get(name)}, not {value}"
                                f": {HINT}, or keep both: --memory_path=FILE")
        ptr = saved.get("next")
        if not 0 < count <= self.max_size or not isinstance(ptr, int) or not 0 <= ptr <= count:
            raise UserError(f"{path}: {count} transitions, the next one at {ptr!r}, but the buffer holds 1 to "
                            f"{self.max_size}: {HINT}")
        return ptr


@contextmanager
def _open_npy_member(archive: zipfile.ZipFile, name: str,
                     dtype: type[np.generic]) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """Open an array of a `.npz` behind its header, which is not trusted; yield its shape, too. Raises ValueError where
    it is of another type."""
    with archive.open(f"{name}.npy") as member:
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError(f"{name}: not an array as they are written here")
        shape, by_column, stored = np.lib.format.read_array_header_1_0(member)
        if stored != dtype or by_column:
            raise ValueError(f"{name}: an array of {stored}")
        yield member, shape
