"""Sharded tensors in checkpoints, in a group of one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import user_error_message
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from common.distributed import is_sharded
from common.sharded_checkpoint import KEY, read_shards, write_shards
from layers import ESMM
from layers.sharding import parameter_groups, shard_embeddings


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint, and what `write_shards` left of it."""
    mesh = init_device_mesh("cpu", (1,))
    table = distribute_tensor(torch.rand(7, 3), mesh, [Shard(0)])
    value = {"epoch": 3, "model": {"table": table, "bias": torch.rand(2)},
             "optimizer": {"state": {0: {"exp_avg": table * 2}}}}
    return value, write_shards(tmp_path, value)


def test_tensors_are_read_as_they_were_written(saved: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path) -> None:
    value, plain = saved
    (tmp_path / "1" / ".metadata").write_bytes(b"a pickle, which is not read")
    torch.save(plain, tmp_path / "checkpoint.pt")
    read = read_shards(tmp_path, torch.load(tmp_path / "checkpoint.pt", weights_only=True), "")
    assert read["epoch"] == 3
    assert torch.equal(read["model"]["bias"], value["model"]["bias"])
    assert torch.equal(read["model"]["table"].full_tensor(), value["model"]["table"].full_tensor())
    assert torch.equal(read["optimizer"]["state"][0]["exp_avg"].full_tensor(),
                       2 * value["model"]["table"].full_tensor())


def test_the_checkpoint_before_is_not_overwritten(saved: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path) -> None:
    value, plain = saved
    assert write_shards(tmp_path, {**value, "epoch": 4})[KEY]["folder"] != plain[KEY]["folder"]
    assert is_sharded(read_shards(tmp_path, plain, "")["model"]["table"])


def test_without_sharded_tensors_nothing_is_written(tmp_path: Path) -> None:
    value = {"epoch": 1, "model": {"bias": torch.rand(2)}}
    assert write_shards(tmp_path, value) == value
    assert read_shards(tmp_path, value, "") == value
    assert not list(tmp_path.iterdir())


def test_damaged_and_forged_tensors_are_refused(saved: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path) -> None:
    _, plain = saved
    forged = [("sha256", {"../x": ""}), ("sha256", {}), ("contents", [["0", [7, 3], [0, 0], [7, 3], "../x", 0, 9]]),
              ("contents", [["0", 7]]), ("folder", "../x"), ("contents", [])]
    for name, part in forged:
        text = user_error_message(lambda name=name, part=part: read_shards(
            tmp_path, {**copy.copy(plain), KEY: {**plain[KEY], name: part}}, "start anew"))
        assert text.startswith(str(tmp_path)), name
        assert text.endswith("start anew"), name
    (file,) = plain[KEY]["sha256"]
    path = tmp_path / plain[KEY]["folder"] / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "checksum" in user_error_message(lambda: read_shards(tmp_path, plain, ""))


def test_a_sharded_model_predicts_the_same_and_has_the_same_gradients() -> None:
    model = ESMM([5, 7], 2, 4, [8], [4], 2, dropout=0.0)
    sharded = copy.deepcopy(model)
    shard_embeddings(sharded)
    batch = torch.randint(5, (6, 2)), torch.rand(6, 2)
    assert [len(group["params"]) for group in parameter_groups(sharded)][1] == 1
    for network in (model, sharded):
        network(*batch).sum().backward()
    torch.testing.assert_close(sharded(*batch), model(*batch))
    table = sharded.input.embedding.embedding.weight
    assert table.grad.placements == table.placements, "no process has the gradient of the whole table"
    torch.testing.assert_close(table.grad.full_tensor(), model.input.embedding.embedding.weight.grad)
