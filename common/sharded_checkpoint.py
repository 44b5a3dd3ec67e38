"""Checkpoints of sharded tensors, by `torch.distributed.checkpoint`: each process writes and reads its own rows.

The tensors go into a folder; the checkpoint's file has everything else, the checksums of the folder's files, and where
which rows are. `torch.distributed.checkpoint` keeps that in a pickle beside them, which is not read here: it could run
code.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, zeros

from common import distributed
from common.errors import UserError
from common.fileio import is_safe_filename, sha256

KEY = "sharded tensors"


class _Reader(FileSystemReader):
    """Reads a folder whose contents are known: rows of (tensor, size, offset, rows, file, position, bytes)."""

    def __init__(self, folder: Path, contents: list[list[Any]]) -> None:
        super().__init__(folder)
        self.contents = contents

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        tensors: dict[str, TensorStorageMetadata] = {}
        storage = {}
        for name, size, offset, rows, file, position, length in self.contents:
            tensor = tensors.setdefault(name, TensorStorageMetadata(TensorProperties(torch.float32), Size(size), []))
            tensor.chunks.append(ChunkStorageMetadata(Size(offset), Size(rows)))
            storage[MetadataIndex(name, offset)] = _StorageInfo(file, position, length)
        return Metadata(dict(tensors), storage_data=storage, storage_meta=StorageMeta(load_id=self.load_id))


def write_shards(folder: Path, value: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint without its sharded tensors, which are written into a folder; as it is where there are none.

    Of two folders in `folder` the one is written that the checkpoint before does not have: they take turns by epoch.
    """
    tensors: dict[str, Tensor] = {}

    def take(tensor: Any) -> Any:
        if not distributed.is_sharded(tensor):
            return tensor
        tensors[str(len(tensors))] = tensor
        return {KEY: len(tensors) - 1}

    value = _map(value, take)
    if not tensors:
        return value
    target = folder / str(value["epoch"] % 2)
    if distributed.is_main_process():
        shutil.rmtree(target, ignore_errors=True)
    distributed.barrier()
    metadata = save(tensors, storage_writer=FileSystemWriter(target))
    contents = []
    for index, stored in metadata.storage_data.items():
        tensor = metadata.state_dict_metadata[index.fqn]
        chunk = next(chunk for chunk in tensor.chunks if chunk.offsets == index.offset)
        contents.append([index.fqn, list(tensor.size), list(chunk.offsets), list(chunk.sizes), stored.relative_path,
                         stored.offset, stored.length])
    files = sorted({file for *_, file, _, _ in contents})
    return {**value, KEY: {"folder": target.name, "contents": contents,
                           "sha256": {file: sha256(target / file) for file in files}}}


def read_shards(folder: Path, value: dict[str, Any], hint: str) -> dict[str, Any]:
    """A checkpoint with its sharded tensors, of which `write_shards` wrote a folder. Raises UserError."""
    if KEY not in value:
        return value
    try:
        saved = value.pop(KEY)
        target = folder / str(int(saved["folder"]))
        for file, digest in saved["sha256"].items():
            if not is_safe_filename(file) or sha256(target / file) != digest:
                raise UserError(f"{target / file}: checksum mismatch: the file is damaged: {hint}")
        mesh = init_device_mesh("cuda" if torch.distributed.get_backend() == "nccl" else "cpu",
                                (distributed.world_size(),))
        sizes = {name: size for name, size, *_ in saved["contents"]}
        if 4 * sum(map(math.prod, sizes.values())) > sum((target / file).stat().st_size for file in saved["sha256"]):
            raise ValueError("more rows than the files have")
        if not saved["sha256"].keys() >= {file for *_, file, _, _ in saved["contents"]}:
            raise ValueError("a file without a checksum")
        tensors = {name: zeros(*size, device_mesh=mesh, placements=[Shard(0)]) for name, size in sizes.items()}
        load(tensors, storage_reader=_Reader(target, saved["contents"]))
        return _map(value, lambda item: tensors[str(item[KEY])] if isinstance(item, dict) and KEY in item else item)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, CheckpointException) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{folder}: sharded tensors that cannot be read ({reason}): {hint}") from error


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    """A value with everything in its dictionaries changed."""
    value = change(value)
    return {name: _map(item, change) for name, item in value.items()} if isinstance(value, dict) else value
