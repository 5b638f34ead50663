"""Checkpoints: independent of world size and strategy, complete or ignored, and free of code."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import threading
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bestrq.training import tensor_files
from bestrq.training.background_writer import BackgroundWriter
from bestrq.training.checkpoint import (
    COMPLETE,
    CheckpointSettings,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    verify_checkpoint,
)
from bestrq.training.checkpoint_saving import take_snapshot, write_checkpoint
from bestrq.training.optimizer import OptimizerSettings, build_optimizer, set_learning_rates
from bestrq.training.process import DistributedSettings, World, parallelise
from common.errors import UserError
from common.files import crc32_of
from tests.file_operations import KILLED, FileOperations
from tests.gloo import forkserver, run_distributed
from tests.patience import PATIENCE
from tests.saved_checkpoints import save_checkpoint

Parts = tuple[nn.Module, torch.optim.Optimizer]
TENSOR_FILES = ("model.safetensors", "optimizer.safetensors", "extra.safetensors")


class Odd(nn.Module):
    """Sizes that no world size divides, one smaller than the world, a buffer, and a parameter never trained."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(5, 7)
        self.head = nn.Linear(7, 1)
        self.unused = nn.Parameter(torch.randn(3))
        self.low = nn.Parameter(torch.randn(3, 3, dtype=torch.bfloat16), requires_grad=False)
        self.register_buffer("seen", torch.tensor([3, 1, 4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.block(x)))


def make(world: World, strategy: str, seed: int) -> Parts:
    torch.manual_seed(seed)
    settings = DistributedSettings(strategy=strategy, device="cpu", precision="float32")
    model = Odd()
    parallel = parallelise(model, [model.block], world, settings, find_unused_parameters=True)
    optimizer = build_optimizer([(parallel.named_parameters(), OptimizerSettings(warmup_steps=0))])
    return parallel, optimizer


def advance(parts: Parts, steps: int, world_size: int = 1) -> None:
    """Train on the same inputs on all ranks; each gives its share of one loss."""
    model, optimizer = parts
    for step in range(1, steps + 1):
        set_learning_rates(optimizer, step, 10)
        (model(torch.arange(10.0).view(2, 5) / 10).square().sum() / world_size).backward()
        optimizer.step()
        optimizer.zero_grad()


def save(folder: Path, step: int, parts: Parts, world: World | None = None) -> Path:
    extra = {"codebook": torch.arange(4.0)}
    return save_checkpoint(folder, step, *parts, {"data": [step, 0]}, world or World(), extra)


def save_as(world: World, strategy: str, folder: str) -> str:
    parts = make(world, strategy, seed=1)
    advance(parts, 3, world.size)
    return str(save(Path(folder), 3, parts, world))


def pass_on(world: World, strategy: str, source: str, target: str) -> tuple[int, dict[str, object], list[float]]:
    parts = make(world, strategy, seed=2 + world.rank)
    chosen = latest_checkpoint(Path(source), world)
    assert chosen is not None
    loaded = load_checkpoint(chosen, *parts, world)
    save(Path(target), loaded.step, parts, world)
    advance(parts, 2, world.size)  # training continues from the loaded state
    save(Path(target), loaded.step + 2, parts, world)
    return loaded.step, loaded.state, loaded.extra_tensors["codebook"].tolist()


def contents(path: Path) -> dict[str, Tensor]:
    return {f"{file}:{name}": tensor for file in TENSOR_FILES for name, tensor in load_file(path / file).items()}


def test_every_bit_survives_the_way_from_ddp_over_fsdp_on_3_to_fsdp_on_2_to_one_process(tmp_path: Path) -> None:
    route = [("ddp", 2), ("fsdp", 3), ("fsdp", 2), ("ddp", 1)]
    run_distributed(save_as, 2, "ddp", str(tmp_path / "0"))
    first = contents(tmp_path / "0" / "step-00000003")
    assert {"model.safetensors:block.weight", "model.safetensors:seen", "optimizer.safetensors:exp_avg_sq/head.bias",
            "optimizer.safetensors:step/block.bias", "extra.safetensors:codebook"} <= first.keys()  # fmt: skip
    assert not any("unused" in name or "module." in name for name in first if name.startswith("optimizer"))
    assert first["model.safetensors:low"].dtype == torch.bfloat16
    continued = []
    for hop, (strategy, size) in enumerate(route[1:], start=1):
        source, target = tmp_path / str(hop - 1), tmp_path / str(hop)
        if hop > 1:
            shutil.rmtree(source / "step-00000005")
        results = run_distributed(pass_on, size, strategy, str(source), str(target))
        assert results == [(3, {"data": [3, 0]}, [0.0, 1.0, 2.0, 3.0])] * size
        passed = contents(target / "step-00000003")
        assert passed.keys() == first.keys()
        assert [name for name in first if not torch.equal(passed[name], first[name])] == []
        continued.append(load_file(target / "step-00000005" / "model.safetensors"))
    for other in continued[1:]:
        torch.testing.assert_close(other, continued[0], rtol=1e-5, atol=1e-7)


def single(folder: Path, steps: tuple[int, ...] = (1, 2)) -> Parts:
    parts = make(World(), "ddp", seed=1)
    for step in steps:
        advance(parts, 1)
        save(folder, step, parts)
    return parts


def test_training_on_from_a_checkpoint_equals_training_through_bit_for_bit(tmp_path: Path) -> None:
    parts = single(tmp_path)
    advance(parts, 2)
    fresh = make(World(), "ddp", seed=9)
    load_checkpoint(tmp_path / "step-00000002", *fresh, World())
    advance(fresh, 2)
    for (name, a), (_, b) in zip(parts[0].named_parameters(), fresh[0].named_parameters(), strict=True):
        assert torch.equal(a, b), name


def die_at(point: int, folder: Path) -> None:
    """In a child process: save step 2 and die at the given write to the folder, counted from 0."""
    operations = FileOperations(folder, point)
    real_write = tensor_files.write_tensors

    def write_in_pieces(file: BinaryIO, tensors: dict[str, Tensor]) -> int:
        operations.tick()
        content = io.BytesIO()
        crc32 = real_write(content, tensors)
        file.write(content.getvalue()[:-10])
        file.flush()
        operations.tick()
        file.write(content.getvalue()[-10:])
        file.flush()
        operations.tick()
        return crc32

    tensor_files.write_tensors = write_in_pieces
    parts = make(World(), "ddp", seed=1)
    advance(parts, 1)
    operations.watch()
    save(folder, 2, parts)
    os._exit(0)


def test_a_kill_at_any_write_of_a_save_leaves_the_step_before_or_the_whole_new_one(tmp_path: Path) -> None:
    parts = single(tmp_path / "first", (1,))
    outcomes = []
    for point in range(200):
        folder = tmp_path / f"kill-{point}"
        shutil.copytree(tmp_path / "first", folder)
        child = forkserver().Process(target=die_at, args=(point, folder))
        child.start()
        child.join(PATIENCE)
        assert child.exitcode in (0, KILLED)
        chosen = latest_checkpoint(folder, World())
        assert chosen is not None and verify_checkpoint(chosen) is None
        outcomes.append(chosen.name)
        load_checkpoint(chosen, *parts, World())
        assert not list(folder.glob(".tmp-*"))
        # The continued run reaches the same step again, and this time gets through.
        again = save(folder, 2, parts)
        assert latest_checkpoint(folder, World()) == again
        if child.exitcode == 0:
            break
    assert child.exitcode == 0 and len(outcomes) > 15
    assert outcomes == ["step-00000001"] * (len(outcomes) - 1) + ["step-00000002"]


@pytest.mark.parametrize("file", [*TENSOR_FILES, "state.json", COMPLETE])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "empty"])
def test_a_checkpoint_damaged_in_any_file_is_passed_over_for_the_one_before_and_named(
    file: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    single(tmp_path)
    path = tmp_path / "step-00000002" / file
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "flip":
        middle = len(content) // 2 if file != COMPLETE else content.index(b"crc32") + 9  # a digit of a checksum
        changed = (content[middle] ^ 1,)
        path.write_bytes(content[:middle] + bytes(changed) + content[middle + 1 :])
    else:
        path.write_bytes(b"" if damage == "empty" else content[:-3])
    assert latest_checkpoint(tmp_path, World()) == tmp_path / "step-00000001"
    assert "step-00000002" in capsys.readouterr().err


@pytest.mark.parametrize("step", [5, -1, 1.5, "1", None, True])
def test_a_checkpoint_with_the_step_of_another_is_refused(step: object, tmp_path: Path) -> None:
    """Its checksums may be right: state.json can be edited with them."""
    parts = single(tmp_path, (1,))
    path = tmp_path / "step-00000001" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": step}))
    with pytest.raises(UserError, match=r"state\.json has step"):
        load_checkpoint(tmp_path / "step-00000001", *parts, World())


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"files": {"model.safetensors": {"bytes": 1e999, "crc32": 0}}}', '{"files": 1}']
)
def test_a_hostile_marker_is_none(content: str, tmp_path: Path) -> None:
    single(tmp_path)
    (tmp_path / "step-00000002" / COMPLETE).write_text(content)
    assert latest_checkpoint(tmp_path, World()) == tmp_path / "step-00000001"
    (tmp_path / "step-00000002" / COMPLETE).unlink()
    os.mkfifo(tmp_path / "step-00000002" / COMPLETE)
    assert latest_checkpoint(tmp_path, World()) == tmp_path / "step-00000001"


def test_a_damaged_checkpoint_does_not_block_its_step_and_is_kept_for_inspection(tmp_path: Path) -> None:
    parts = single(tmp_path)
    (tmp_path / "step-00000002" / "state.json").write_text("{")
    assert latest_checkpoint(tmp_path, World()) == tmp_path / "step-00000001"
    assert len(list(tmp_path.glob("damaged-*-step-00000002"))) == 1
    save(tmp_path, 2, parts)
    assert latest_checkpoint(tmp_path, World()) == tmp_path / "step-00000002"


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_complete_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    parts = single(tmp_path, (1,))
    before = snapshot(tmp_path / "step-00000001")
    advance(parts, 1)
    save(tmp_path, 1, parts)
    assert snapshot(tmp_path / "step-00000001") == before


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    single(tmp_path, (1, 2, 3, 4, 5))
    (tmp_path / "step-00000006").mkdir()  # cut short, and newer than anything complete: not pruning's business
    (tmp_path / "step-00000003" / COMPLETE).unlink()  # an earlier pruning was cut short here
    prune_checkpoints(tmp_path, CheckpointSettings(keep_last=2), 2)
    left = sorted(int(path.name.removeprefix("step-")) for path in tmp_path.iterdir())
    assert left == [2, 4, 5, 6]


def test_pruning_keeps_every_mth_step_besides(tmp_path: Path) -> None:
    single(tmp_path, (1, 2, 3, 4, 5, 6, 7))
    prune_checkpoints(tmp_path, CheckpointSettings(keep_last=1, keep_every=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (3, 6, 7)]


def test_a_snapshot_does_not_change_while_training_goes_on(tmp_path: Path) -> None:
    parts = make(World(), "ddp", seed=1)
    advance(parts, 1)
    extra = {"counts": torch.arange(3)}
    snapshot = take_snapshot(1, *parts, {}, World(), extra)
    before = {group: {name: t.clone() for name, t in named.items()} for group, named in snapshot.tensors.items()}
    advance(parts, 1)
    extra["counts"] += 1
    write_checkpoint(tmp_path, snapshot)
    for group, named in before.items():
        stored = load_file(tmp_path / f"step-00000001/{group}.safetensors")
        assert stored.keys() == named.keys() and all(torch.equal(stored[name], t) for name, t in named.items()), group


def test_training_goes_on_during_a_write_and_waits_for_it_before_the_next_step() -> None:
    writer, go, log = BackgroundWriter(World()), threading.Event(), []
    writer.begin(1)
    writer.submit(go.wait, PATIENCE)
    writer.submit(log.append, "written")
    writer.begin(1)  # the same step: no wait
    assert log == []
    threading.Timer(0.2, go.set).start()
    writer.begin(2)
    assert log == ["written"]
    writer.close()


def test_writes_after_a_failed_one_are_left_out_and_the_next_step_reports_it() -> None:
    def full() -> None:
        raise UserError("the disk is full")

    writer, log = BackgroundWriter(World()), []
    writer.begin(1)
    writer.submit(full)
    writer.submit(log.append, "step 1 is saved")
    with pytest.raises(UserError, match="the disk is full"):
        writer.begin(2)
    writer.submit(log.append, "step 2")
    writer.close()
    assert log == ["step 2"]


class Hostile:
    """Unpickling this writes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.sentinel,))


def test_a_planted_pickle_does_not_run_whatever_its_name(tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    hostile = pickle.dumps(Hostile(sentinel))
    parts = single(tmp_path / "run", (1,))
    path = tmp_path / "run" / "step-00000001"
    for name in (".metadata", "model.pt", "optimizer.pt", "__0_0.distcp", "state.pkl"):
        (path / name).write_bytes(hostile)
    assert latest_checkpoint(tmp_path / "run", World()) == path
    load_checkpoint(path, *parts, World())
    for name in (*TENSOR_FILES, "state.json"):
        good, good_marker = (path / name).read_bytes(), (path / COMPLETE).read_bytes()
        (path / name).write_bytes(hostile)
        marker = json.loads(good_marker)
        marker["files"][name] = {"bytes": len(hostile), "crc32": crc32_of(path / name)}
        (path / COMPLETE).write_text(json.dumps(marker))
        assert verify_checkpoint(path) is None  # the marker of the forged file is correct
        with pytest.raises(UserError, match=name):
            load_checkpoint(path, *parts, World())
        (path / name).write_bytes(good)
        (path / COMPLETE).write_bytes(good_marker)
    assert not sentinel.exists()
    pickle.loads(hostile)
    assert sentinel.exists()  # it does run where it is unpickled


def test_a_checkpoint_of_another_model_is_refused_by_the_names_and_shapes_that_differ(tmp_path: Path) -> None:
    single(tmp_path, (1,))
    other = Odd()
    other.block = nn.Linear(5, 8)
    other.more = nn.Linear(1, 1)
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path / "step-00000001", other, None, World())
    for part in ("more.weight is missing", "block.weight is [7, 5], but the model has [8, 5]", "model.safetensors"):
        assert part in str(caught.value)


def full_disk(world: World, folder: str) -> tuple[str, list[str], str]:
    parts = make(world, "ddp", seed=1)
    advance(parts, 1)
    save(Path(folder), 1, parts, world)
    real = tensor_files.write_tensors

    def fail(file: BinaryIO, tensors: dict[str, Tensor]) -> int:
        raise OSError(28, "No space left on device")

    tensor_files.write_tensors = fail
    try:
        save(Path(folder), 2, parts, world)
        message = ""
    except UserError as error:
        message = str(error)
    tensor_files.write_tensors = real
    left = sorted(os.listdir(folder))
    world.barrier()
    return message, left, save(Path(folder), 2, parts, world).name


def test_a_full_disk_on_rank_0_is_an_error_on_all_ranks_and_the_earlier_checkpoint_stays(tmp_path: Path) -> None:
    for message, left, later in run_distributed(full_disk, 2, str(tmp_path)):
        assert "No space left on device" in message and "step-00000002" in message
        assert left == ["step-00000001"] and later == "step-00000002"


def differing_views(world: World, main_folder: str, other_folder: str) -> str:
    chosen = latest_checkpoint(Path(main_folder if world.is_main else other_folder), world)
    return chosen.name if chosen else ""


def test_rank_0_chooses_the_checkpoint_even_where_another_rank_sees_a_newer_one(tmp_path: Path) -> None:
    single(tmp_path / "a", (1,))
    single(tmp_path / "b", (1, 2))
    views = run_distributed(differing_views, 2, str(tmp_path / "a"), str(tmp_path / "b"))
    assert views == ["step-00000001"] * 2


def test_no_folder_and_an_empty_folder_have_no_latest_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none", World()) is None
    assert latest_checkpoint(tmp_path, World()) is None
