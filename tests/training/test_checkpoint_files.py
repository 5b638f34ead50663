"""Checkpoints of several files: the same for any world, complete or ignored, read by shards, checked by all ranks."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bestrq.training import checkpoint, checkpoint_files, tensor_files
from bestrq.training.background_writer import BackgroundWriter
from bestrq.training.checkpoint import COMPLETE, latest_checkpoint, load_checkpoint, read_marker, verify_checkpoint
from bestrq.training.checkpoint_files import collect_receipts, divide, write_share
from bestrq.training.checkpoint_saving import submit_checkpoint, take_snapshot, write_checkpoint
from bestrq.training.optimizer import OptimizerSettings, build_optimizer
from bestrq.training.process import DistributedSettings, World, parallelise
from bestrq.training.tensor_reading import read_group
from common.errors import UserError
from tests.file_operations import KILLED, FileOperations
from tests.gloo import forkserver, run_distributed
from tests.patience import PATIENCE
from tests.saved_checkpoints import save_checkpoint
from tests.training.test_checkpoint import Odd, Parts, advance

DDP = DistributedSettings(strategy="ddp", device="cpu", precision="float32")
FSDP = replace(DDP, strategy="fsdp")
HYBRID = replace(DDP, strategy="hsdp", shard_size=2)
TINY = 1e-7
"""gigabytes of a file: 100 bytes, so that the model has several"""
NEVER = -1
"""write before which a process does not die"""


def make(world: World, how: DistributedSettings = DDP, seed: int = 1) -> Parts:
    torch.manual_seed(seed)
    model = Odd()
    parallel = parallelise(model, [model.block], world, how, find_unused_parameters=True)
    return parallel, build_optimizer([(parallel.named_parameters(), OptimizerSettings(warmup_steps=0))])


def save(folder: Path, step: int, parts: Parts, world: World | None = None, gigabytes: float = TINY) -> Path:
    extra = {"codebook": torch.arange(40.0), "counts": torch.arange(3)}
    return save_checkpoint(folder, step, *parts, {"data": [step, 0]}, world or World(), extra, gigabytes)


def saved(folder: Path, steps: tuple[int, ...] = (1,)) -> Path:
    """Checkpoints of one process; returns the last one."""
    parts = make(World())
    for step in steps:
        advance(parts, 1)
        path = save(folder, step, parts)
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {f"{group}:{name}": tensor for group in ("model", "optimizer", "extra")
            for name, tensor in read_group(path, group).items()}  # fmt: skip


# ---- Division ----


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries({
        group: st.dictionaries(st.text("ab./", min_size=1), st.integers(0, 50), max_size=12)
        for group in ("model", "optimizer", "extra")
    }),
    st.integers(1, 60),
    st.integers(1, 9),
)  # fmt: skip
def test_every_tensor_is_in_one_file_of_at_most_the_limit_and_ranks_have_about_as_many_bytes(
    sizes: dict[str, dict[str, int]], limit: int, ranks: int
) -> None:
    files = divide(sizes, limit, ranks)
    content = {name: (file.group, file.tensors) for name, file in files.items()}
    assert content == {name: (file.group, file.tensors) for name, file in divide(sizes, limit, 1).items()}
    bytes_of = {name: sum(sizes[file.group][key] for key in file.tensors) for name, file in files.items()}
    for group, named in sizes.items():
        assert [key for file in files.values() if file.group == group for key in file.tensors] == sorted(named)
    for name, file in files.items():
        assert bytes_of[name] <= limit or len(file.tensors) == 1
    owners = [file.rank for file in files.values()]
    assert owners == sorted(owners) and owners[0] >= 0 and owners[-1] < ranks
    if len(files) == 3:  # one file per group: no rank but 0 has anything to do
        assert owners == [0, 0, 0] and list(files) == [f"{group}.safetensors" for group in sizes]
    else:
        total, longest = sum(bytes_of.values()), max(bytes_of.values())
        for rank in range(ranks):
            share = sum(bytes_of[name] for name, file in files.items() if file.rank == rank)
            assert share <= total / ranks + longest


# ---- Any world ----


def pass_on(world: World, how: DistributedSettings, source: str, target: str) -> tuple[list[float], int, int]:
    """Load a checkpoint into other weights and save it again. Returns an extra tensor, bytes held and of the files."""
    parts = make(world, how, seed=2 + world.rank)
    loaded = load_checkpoint(Path(source), *parts, world)
    save(Path(target), loaded.step, parts, world)
    copies = take_snapshot(1, *parts, {}, world, dict(loaded.extra_tensors), TINY)
    held = sum(tensor.nbytes for named in copies.tensors.values() for tensor in named.values())
    mine = {name for name, file in copies.files.items() if file.rank == world.rank}
    path = Path(target) / f"step-{loaded.step:08d}"
    return (
        loaded.extra_tensors["codebook"].tolist(),
        held,
        sum(tensor.nbytes for name in mine for tensor in load_file(path / name).values()),
    )


@pytest.mark.parametrize(("how", "size"), [(DDP, 2), (FSDP, 3), (HYBRID, 4)], ids=["ddp", "fsdp", "hsdp"])
def test_any_world_loads_every_bit_and_writes_the_same_files_each_rank_its_share(
    how: DistributedSettings, size: int, tmp_path: Path
) -> None:
    """No world size divides the parameters; some shards are empty."""
    first = saved(tmp_path / "first", (3,))
    expected = files_of(first)
    assert {"model-00001-of-00003.safetensors", "optimizer-00002-of-00005.safetensors"} <= expected.keys()
    found = run_distributed(pass_on, size, how, str(first), str(tmp_path / "passed"))
    assert files_of(tmp_path / "passed/step-00000003") == expected
    assert os.listdir(tmp_path / "passed") == ["step-00000003"]
    for codebook, held, written in found:
        assert codebook == list(range(40)) and held == written > 0


def test_one_file_and_several_hold_the_same_tensors_and_load_alike(tmp_path: Path) -> None:
    parts = make(World())
    advance(parts, 2)
    one, several = save(tmp_path / "one", 2, parts, None, 2.0), save(tmp_path / "several", 2, parts)
    assert sorted(files_of(one)) == [COMPLETE, "extra.safetensors", "model.safetensors", "optimizer.safetensors",
                                     "state.json"]  # fmt: skip
    expected = tensors_of(one)
    for path in (one, several):
        fresh = make(World(), seed=5)
        load_checkpoint(path, *fresh, World())
        again = tensors_of(save(tmp_path / f"{path.parent.name} again", 2, fresh))
        assert again.keys() == expected.keys() == tensors_of(path).keys()
        assert [name for name in expected if not torch.equal(again[name], expected[name])] == []


def save_2(world: World, folder: str) -> None:
    parts = make(world)
    advance(parts, 2, world.size)
    save(Path(folder), 2, parts, world)


def test_files_of_a_dead_attempt_are_not_taken_for_those_of_a_new_one(tmp_path: Path) -> None:
    run_distributed(save_2, 2, str(tmp_path / "expected"))
    old = saved(tmp_path / "old", (2,))  # other weights, after one step of training
    for folder in (".tmp-1-00000000", "step-00000002"):
        shutil.copytree(old, tmp_path / "run" / folder)
        (tmp_path / "run" / folder / COMPLETE).unlink()
        receipt = {"files": read_json_entries(old), "problem": None}
        (tmp_path / "run" / folder / "rank-1.json").write_text(json.dumps(receipt))
    (tmp_path / "run/step-00000002/model-00001-of-00002.safetensors").write_bytes(b"")
    run_distributed(save_2, 2, str(tmp_path / "run"))
    assert files_of(tmp_path / "run/step-00000002") == files_of(tmp_path / "expected/step-00000002")


def read_json_entries(path: Path) -> Any:
    return json.loads((path / COMPLETE).read_text())["files"]


def save_twice(world: World, folder: str) -> list[str]:
    """As after a stop at a step that is being saved."""
    parts, writer = make(world), BackgroundWriter(world)
    advance(parts, 1, world.size)
    for _ in range(2):
        writer.begin(1)
        submit_checkpoint(writer, Path(folder), take_snapshot(1, *parts, {}, world, {}, TINY))
    writer.close()
    return os.listdir(folder)


def test_overlapping_saves_of_a_step_leave_one_complete_checkpoint(tmp_path: Path) -> None:
    assert run_distributed(save_twice, 2, str(tmp_path)) == [["step-00000001"]] * 2
    assert verify_checkpoint(tmp_path / "step-00000001") is None


# ---- Failures and kills ----


def full_disk(world: World, folder: str, failing: int, receipt_too: bool) -> tuple[str, list[str]]:
    parts = make(world)
    advance(parts, 1, world.size)
    save(Path(folder), 1, parts, world)
    real = tensor_files.write_tensors, checkpoint_files.write_json

    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    def slow(file: BinaryIO, tensors: Mapping[str, Tensor]) -> int:
        time.sleep(0.3)  # these ranks still write when the other has failed
        return real[0](file, tensors)

    tensor_files.write_tensors = fail if world.rank == failing else slow
    if world.rank == failing and receipt_too:
        checkpoint_files.write_json = fail
    message = ""
    try:
        save(Path(folder), 2, parts, world)
    except UserError as error:
        message = str(error)
    tensor_files.write_tensors, checkpoint_files.write_json = real
    left = sorted(os.listdir(folder))
    world.barrier()
    save(Path(folder), 2, parts, world)
    return message, left


@pytest.mark.parametrize(("failing", "receipt_too"), [(1, False), (1, True), (0, False)])
def test_a_full_disk_on_one_rank_ends_all_with_its_error_and_the_next_save_succeeds(
    failing: int, receipt_too: bool, tmp_path: Path
) -> None:
    found = run_distributed(full_disk, 3, str(tmp_path), failing, receipt_too)
    assert len({message for message, _ in found}) == 1
    message, left = found[0]
    assert "No space left on device" in message and "step-00000002" in message and left == ["step-00000001"]
    assert ("(rank 1)" in message) == (failing == 1)
    assert verify_checkpoint(tmp_path / "step-00000002") is None


def test_the_wait_for_a_rank_that_has_written_nothing_ends(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(OSError, match="rank 1 has not written its files"):
        collect_receipts(tmp_path, {1}, lambda: began + 0.2)
    assert time.monotonic() > began + 0.2


def die_in_a_write(world: World, folder: str) -> None:
    parts = make(world)
    advance(parts, 1, world.size)
    if world.rank == 1:
        tensor_files.write_tensors = lambda *_: os._exit(KILLED)  # type: ignore[assignment]
    save(Path(folder), 2, parts, world)


def test_a_rank_that_dies_while_it_writes_ends_the_others_at_the_next_wait(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(AssertionError) as caught:
        run_distributed(die_in_a_write, 2, str(tmp_path))
    assert "[rank 1] died without an error" in str(caught.value) and "in wait" in str(caught.value)
    assert "did not return" not in str(caught.value)
    assert latest_checkpoint(tmp_path, World()) == tmp_path / "step-00000001"
    assert os.listdir(tmp_path) == ["step-00000001"]


def die_at(rank: int, killed: int, point: int, folder: Path, temporary: Path) -> None:
    """In a process of its own: the writes of a rank of two in a save of step 2; `killed` dies before the given one."""
    operations = FileOperations(folder, point if rank == killed else NEVER)
    real_write, real_sync = tensor_files.write_tensors, os.fsync

    def write_half_first(file: BinaryIO, tensors: Mapping[str, Tensor]) -> int:
        crc32 = real_write(file, tensors)
        file.flush()
        size = file.tell()
        file.truncate(size // 2)
        operations.tick()
        file.seek(0)
        return real_write(file, tensors) if size else crc32

    def sync(descriptor: int) -> None:
        operations.tick()
        real_sync(descriptor)

    parts = make(World())
    advance(parts, 2)
    world = World(rank=rank, size=2)
    extra = {"codebook": torch.arange(40.0), "counts": torch.arange(3)}
    snapshot = take_snapshot(2, *parts, {"data": [2, 0]}, world, extra, 3e-7)
    tensor_files.write_tensors, os.fsync = write_half_first, sync
    operations.watch()
    if rank:
        write_share(temporary, snapshot.files, snapshot.tensors, rank)
    else:
        collect = partial(collect_receipts, temporary, {1}, lambda: time.monotonic() + PATIENCE)
        write_checkpoint(folder, snapshot, temporary, collect)
    if rank == killed:
        (folder.parent / "operations").write_text(str(operations.count))
    os._exit(0)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_kill_of_a_rank_at_any_write_leaves_the_step_before_or_the_whole_new_one(killed: int, tmp_path: Path) -> None:
    """Rank 0 is killed too, as a collective fails there, if rank 1 dies before it has written its files.

    Continuous integration tries a few writes; `KILL_POINTS=all` tries all of them.
    """
    saved(tmp_path / "first")

    def attempt(point: int) -> tuple[int | None, str]:
        """Exit status of the rank to be killed, and the checkpoint from which training goes on."""
        folder = tmp_path / f"kill-{point}"
        shutil.copytree(tmp_path / "first", folder)
        temporary = folder / ".tmp-1-0123abcd"
        temporary.mkdir()
        ranks = [forkserver().Process(target=die_at, args=(rank, killed, point, folder, temporary)) for rank in (0, 1)]
        for process in ranks:
            process.start()
        ranks[killed].join(PATIENCE)
        if killed == 1 and ranks[1].exitcode:
            ranks[0].kill()
        for process in ranks:
            process.join(PATIENCE)
        chosen = latest_checkpoint(folder, World())
        assert chosen is not None and verify_checkpoint(chosen) is None
        load_checkpoint(chosen, *make(World()), World())
        assert not list(folder.glob(".tmp-*")) and not list(chosen.glob("rank-*"))
        return ranks[killed].exitcode, chosen.name

    assert attempt(NEVER) == (0, "step-00000002")
    operations = int((tmp_path / "operations").read_text())
    assert operations > 9
    every = 1 if os.environ.get("KILL_POINTS") == "all" else operations // 3
    outcomes = [attempt(point) for point in [*range(1, operations - 1, every), operations - 1]]
    assert {status for status, _ in outcomes} == {KILLED}
    names = [name for _, name in outcomes]
    assert names[0] == "step-00000001" and set(names) <= {"step-00000001", "step-00000002"}
    assert killed == 1 or names == sorted(names)


# ---- Loading ----


def peak_of_loading(world: World, path: str) -> float:
    """Megabytes of host memory that loading takes, at its peak, on this rank."""
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(4)])
    parallel = parallelise(model, model, world, FSDP)
    optimizer = build_optimizer([(parallel.named_parameters(), OptimizerSettings())])
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    loaded = load_checkpoint(Path(path), parallel, optimizer, world)
    assert loaded.step == 1
    return (status("VmHWM") - before) / 1024


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is measured by Linux")
def test_a_rank_of_fsdp_reads_no_more_than_its_shards(tmp_path: Path) -> None:
    """Of 192 MiB it maps 96, and allocates 64 for the moments. Reading everything would take 256."""
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(4)])
    optimizer = build_optimizer([(model.named_parameters(), OptimizerSettings())])
    model(torch.ones(1, 2048)).sum().backward()
    optimizer.step()
    path = save_checkpoint(tmp_path, 1, model, optimizer, {}, World(), {}, 0.04)
    assert (path / "optimizer-00004-of-00004.safetensors").exists()
    for peak in run_distributed(peak_of_loading, 2, str(path)):
        assert 100 < peak < 200


def test_a_missing_a_surplus_and_a_doubled_part_are_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path)
    first, second = path / "model-00001-of-00003.safetensors", path / "model-00002-of-00003.safetensors"

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_checkpoint(path, *make(World()), World())

    for name in ("model.safetensors", "model-00004-of-00003.safetensors", "model-00001-of-00004.safetensors",
                 "model-1-of-3.safetensors", "model-00001-of-99999999999999.safetensors"):  # fmt: skip
        shutil.copy(first, path / name)
        refused(r"model\S* (does not belong beside model-00001-of-00003|is missing)")
        (path / name).unlink()
    for part in (first, second):
        content = part.read_bytes()
        part.unlink()
        refused(f"{part.name} is missing")
        part.write_bytes(content[:-9])
        refused(f"cannot read .*{part.name}")
        part.write_bytes(content)
    save_file(load_file(first) | load_file(second), second)
    refused(f"{second.name} has the tensor .*, which is in {first.name} too")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/file"])
def test_a_marker_with_a_file_outside_the_folder_is_none(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path, (1, 2))
    document = json.loads((path / COMPLETE).read_text())
    document["files"][name] = {"bytes": 1, "crc32": 0}
    (path / COMPLETE).write_text(json.dumps(document))
    assert read_marker(path) is None
    assert latest_checkpoint(tmp_path, World()) == tmp_path / "step-00000001"


# ---- Verification ----


def choose(world: World, folder: str) -> tuple[str, list[str]]:
    """Checkpoint that is chosen, or the error, and the files that this rank has read of step 2."""
    read, real = [], checkpoint.crc32_of

    def crc32_of(path: Path) -> int:
        if path.parent.name == "step-00000002":
            read.append(path.name)
        return real(path) + (world.rank == 1 and "unreadable" in folder)

    checkpoint.crc32_of = crc32_of
    try:
        chosen = latest_checkpoint(Path(folder), world)
        result = chosen.name if chosen else ""
    except UserError as error:
        result = str(error)
    checkpoint.crc32_of = real
    return result, read


@pytest.mark.parametrize("part", ["model-00002-of-00003.safetensors", "optimizer-00005-of-00005.safetensors"])
def test_a_damaged_part_is_found_by_one_rank_and_all_fall_back(part: str, tmp_path: Path) -> None:
    path = saved(tmp_path, (1, 2))
    content = (path / part).read_bytes()
    (path / part).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = run_distributed(choose, 3, str(tmp_path))
    assert [chosen for chosen, _ in found] == ["step-00000001"] * 3
    assert {name for _, read in found for name in read} >= {part}
    assert [damaged.name[-13:] for damaged in tmp_path.glob("damaged-*")] == ["step-00000002"]


def test_storage_that_fails_on_one_rank_alone_is_an_error_and_no_checkpoint_is_given_up(tmp_path: Path) -> None:
    saved(tmp_path / "unreadable", (1, 2))
    found = run_distributed(choose, 2, str(tmp_path / "unreadable"))
    for message, _ in found:
        assert "step-00000002/" in message and "on rank 1, but not on rank 0" in message
    assert sorted(os.listdir(tmp_path / "unreadable")) == ["step-00000001", "step-00000002"]


def test_undamaged_parts_are_read_once_by_all_ranks_together(tmp_path: Path) -> None:
    path = saved(tmp_path, (1, 2))
    found = run_distributed(choose, 3, str(tmp_path))
    assert [chosen for chosen, _ in found] == ["step-00000002"] * 3
    assert sorted(name for _, read in found for name in read) == sorted(files_of(path).keys() - {COMPLETE})
