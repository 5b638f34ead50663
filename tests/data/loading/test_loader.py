"""The loader: content of rows, the same rows for any world size, resuming, and ending."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import from_dict, to_dict
from common.errors import UserError
from data.format.dataset import Dataset, open_dataset
from data.format.schema import shard_name
from data.loading.batch import BatchPlan, RowReader, SharedBuffers
from data.loading.loader import Batch, DataState, LoaderSettings, RowLoader
from data.loading.order import CropTable
from data.loading.supervised import FixedCrops
from data.storage.local import StorageError
from tests.made_datasets import make_dataset
from tests.patience import PATIENCE, wait_until

LENGTHS = [*np.random.default_rng(0).integers(60, 380, 40).tolist(), 2500, 1300]
SETTINGS = LoaderSettings(
    row_frames=400, rows=8, max_segments=4, block_crops=20, min_seconds=0.5, max_seconds=4.0, num_workers=0
)


def draw(generator: np.random.Generator, frames: int) -> np.ndarray:
    return generator.random(frames) < 0.3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("loader") / "set", LENGTHS)


def loader(
    dataset: Dataset,
    settings: LoaderSettings = SETTINGS,
    crops: CropTable | None = None,
    state: DataState | None = None,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
) -> RowLoader:
    return RowLoader(
        dataset,
        crops or settings.crop_order(dataset),
        settings,
        multiple=4,
        row_gap=4,
        rank=rank,
        world_size=world_size,
        accumulation=accumulation,
        draw_mask=draw,
        state=state,
    )


def same(a: Sequence[Batch], b: Sequence[Batch]) -> bool:
    """The same rows in the same order, however they are divided into batches."""

    def joined(batches: Sequence[Batch], name: str) -> torch.Tensor:
        return torch.cat([attrgetter(name)(batch) for batch in batches])

    names = ("log_mel", "segments.start", "segments.length", "segments.seed", "mask")
    ids = [[row for batch in batches for row in batch.ids] for batches in (a, b)]
    return ids[0] == ids[1] and all(torch.equal(joined(a, name), joined(b, name)) for name in names)


def test_a_batch_holds_the_normalised_frames_and_zeros_elsewhere(dataset: Dataset) -> None:
    for (batch,) in islice(loader(dataset), 6):
        assert batch.log_mel.shape == (8, 400, 80) and batch.log_mel.dtype == torch.float32
        assert batch.mask is not None and batch.mask.shape == (8, 400)
        outside = torch.ones(8, 400, dtype=torch.bool)
        for row in range(8):
            end = -4
            for slot, name in enumerate(batch.ids[row]):
                start, length = int(batch.segments.start[row, slot]), int(batch.segments.length[row, slot])
                assert start % 4 == 0 and start >= end + 4 and length >= 50
                end = start + length
                recording, stretch = name.split(":")
                first, last = map(int, stretch.split("-"))
                number = int(dataset.select(ids=[recording])[0])
                expected = dataset.read_normalised(number, first, last)
                assert np.array_equal(batch.log_mel[row, start:end].numpy(), expected)
                drawn = draw(np.random.Generator(np.random.PCG64(int(batch.segments.seed[row, slot]))), length)
                assert np.array_equal(batch.mask[row, start:end].numpy(), drawn)
                outside[row, start:end] = False
            unused = slice(len(batch.ids[row]), None)
            assert not batch.segments.length[row, unused].any() and not batch.segments.start[row, unused].any()
        assert not batch.log_mel[outside].any() and not batch.mask[outside].any()


def test_a_crop_costs_few_python_calls_and_few_bytes_in_a_plan(dataset: Dataset) -> None:
    """Counts the overhead that limits a worker's rate, since a measured time would depend on the machine."""
    row_loader = loader(dataset)
    rows, _ = next(row_loader.batch_rows_and_states())
    plan = BatchPlan.from_rows(rows)
    crops = sum(len(row.first_frame) for row in rows)
    reader = RowReader(dataset, row_loader.crops, (8, 400, 80), SETTINGS.max_segments, draw)
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    reader[plan]
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        reader[plan]
    finally:
        sys.setprofile(before)
    assert calls / crops < 64
    assert len(pickle.dumps(plan)) < 8 * 8 * crops + 512


def test_an_epoch_reads_every_frame_once(dataset: Dataset) -> None:
    seen = {dataset.id(i): np.zeros(n, int) for i, n in enumerate(dataset.frames)}
    one_row = replace(SETTINGS, rows=1, min_seconds=0.01)
    for (batch,) in loader(dataset, one_row):
        for name in batch.ids[0]:
            recording, stretch = name.split(":")
            first, last = map(int, stretch.split("-"))
            seen[recording][first:last] += 1
        if batch.state.epoch == 1:
            break
    assert batch.state == replace(batch.state, block=0, row=0)
    assert all((count == 1).all() for count in seen.values())


def test_epochs_differ(dataset: Dataset) -> None:
    rows: dict[int, list[list[str]]] = {0: [], 1: []}
    epoch = 0
    for (batch,) in loader(dataset, replace(SETTINGS, rows=1)):
        rows[epoch] += batch.ids
        epoch = batch.state.epoch
        if epoch == 2:
            break
    assert abs(len(rows[0]) - len(rows[1])) <= 2
    assert sum(row in rows[1] for row in rows[0]) < len(rows[0]) / 2


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(dataset: Dataset, num_workers: int) -> None:
    alone = [batch for (batch,) in islice(loader(dataset), 8)]
    settings = replace(SETTINGS, num_workers=num_workers, prefetch=1)
    # All batches are kept, so that the shared buffers run out; kept batches must not change.
    assert same([batch for (batch,) in islice(loader(dataset, settings), 8)], alone)


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 2), (2, 1), (4, 1), (2, 4)])
def test_the_rows_of_a_step_do_not_depend_on_world_size_or_accumulation(
    dataset: Dataset, world_size: int, accumulation: int
) -> None:
    ranks = [
        islice(loader(dataset, rank=rank, world_size=world_size, accumulation=accumulation), 4)
        for rank in range(world_size)
    ]
    for (whole,), parts in zip(islice(loader(dataset), 4), zip(*ranks, strict=True), strict=True):
        assert all(len(part) == accumulation for part in parts)
        batches = [batch for part in parts for batch in part]
        assert same(batches, [whole]) and all(batch.state == whole.state for batch in batches)


def test_resuming_after_any_step_with_other_workers_and_ranks_gives_the_same_rows(dataset: Dataset) -> None:
    whole = [batch for (batch,) in islice(loader(dataset), 10)]
    for done in range(1, 8):
        saved = DataState.from_dict(whole[done - 1].state.to_dict())
        settings = replace(SETTINGS, num_workers=done % 3)
        rank0 = islice(loader(dataset, settings, state=saved, world_size=2), 3)
        rank1 = islice(loader(dataset, settings, state=saved, world_size=2, rank=1), 3)
        for number, ((a,), (b,)) in enumerate(zip(rank0, rank1, strict=True)):
            assert same([a, b], [whole[done + number]])


def test_iterating_again_continues_after_the_last_step(dataset: Dataset) -> None:
    whole = [batch for (batch,) in islice(loader(dataset), 6)]
    first = loader(dataset)
    assert same([batch for (batch,) in islice(first, 2)], whole[:2])
    second = loader(dataset, state=first.state)
    assert same([batch for (batch,) in islice(second, 2)], whole[2:4])
    assert same([batch for (batch,) in islice(loader(dataset, state=second.state), 2)], whole[4:])


def test_a_state_of_other_data_or_another_order_is_refused_by_name(dataset: Dataset, tmp_path: Path) -> None:
    ((batch,),) = islice(loader(dataset), 1)
    other = make_dataset(tmp_path / "other", [*LENGTHS[:-1], 1301])
    with pytest.raises(UserError, match="fingerprint"):
        loader(other, state=batch.state)
    with pytest.raises(UserError, match="max_segments: 4 != 5; row_frames: 400 != 800"):
        loader(dataset, replace(SETTINGS, row_frames=800, max_segments=5), state=batch.state)
    with pytest.raises(UserError, match="must have the fields"):
        DataState.from_dict({"epoch": 1})
    # Rows per step, workers and checksums may change when a run is resumed.
    loader(dataset, replace(SETTINGS, rows=2, num_workers=1, verify_checksums=True), state=batch.state)


def test_rows_that_are_not_divisible_give_the_nearest_valid_numbers(dataset: Dataset) -> None:
    with pytest.raises(UserError, match="rows is 8.*world size 3 x accumulation 2 = 6; nearest: 6 or 12"):
        loader(dataset, world_size=3, accumulation=2)
    with pytest.raises(UserError, match="nearest: 16"):
        loader(dataset, world_size=16)


def test_crops_longer_than_a_row_are_refused(dataset: Dataset) -> None:
    with pytest.raises(UserError, match="row_frames is 400, but crops have up to 500"):
        loader(dataset, crops=FixedCrops([40], [0], [500], ["a"]))


@pytest.mark.parametrize(
    ("field", "value"),
    [("rows", 0), ("num_workers", -1), ("min_seconds", 9.0), ("normalisation", "none"), ("start_method", "thread")],
)
def test_an_invalid_setting_is_named(field: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"{field}\b.*{value}"):
        from_dict(LoaderSettings, to_dict(SETTINGS) | {field: value})


def test_a_fixed_table_has_its_texts(dataset: Dataset) -> None:
    starts = list(range(0, 2400, 100))
    crops = FixedCrops([40] * 24, starts, [s + 90 for s in starts], [f"words at {s}" for s in starts])
    for (batch,) in islice(loader(dataset, crops=crops), 3):
        for names, texts in zip(batch.ids, batch.text, strict=True):
            assert [f"words at {name.split(':')[1].split('-')[0]}" for name in names] == texts


def break_recording(dataset: Dataset, recording: int) -> None:
    """A value that is not a number in its first frame."""
    with open(dataset.path / shard_name(dataset.index.shard[recording]), "r+b") as file:
        file.seek(dataset.index.offset[recording])
        file.write(np.float16("nan").tobytes())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_recording_is_named_during_iteration(tmp_path: Path, num_workers: int) -> None:
    dataset = make_dataset(tmp_path / "set", [100, 200, 300])
    break_recording(dataset, 1)
    settings = replace(SETTINGS, rows=2, num_workers=num_workers, max_quarantined=0)
    with pytest.raises(UserError, match="max_quarantined is 0; first: .*'r001' .*NaN") as caught:
        list(islice(loader(open_dataset(dataset.path), settings), 2))
    assert "Traceback" not in str(caught.value)
    with pytest.raises(UserError, match="'r001' .*checksum of block 0"):
        list(islice(loader(open_dataset(dataset.path), replace(settings, verify_checksums=True)), 2))


def damaged(folder: Path) -> Dataset:
    dataset = make_dataset(folder, LENGTHS)
    for recording in (3, 17, 30):
        break_recording(dataset, recording)
    return open_dataset(folder)


def test_replacements_do_not_depend_on_workers_and_world_size(tmp_path: Path) -> None:
    dataset = damaged(tmp_path / "set")
    alone = loader(dataset)
    batches = [update[0] for update in islice(alone, 12)]
    assert {reason.split("'")[1] for reason in alone.quarantined.values()} == {"r003", "r017", "r030"}
    names = [name.split(":")[0] for batch in batches for row in batch.ids for name in row]
    assert not set(names) & {"r003", "r017", "r030"} and len(set(names)) == len(LENGTHS) - 3
    workers = loader(dataset, replace(SETTINGS, num_workers=2))
    assert same(batches, [update[0] for update in islice(workers, 12)]) and len(workers.quarantined) == 3
    halves = [list(islice(loader(dataset, rank=rank, world_size=2), 12)) for rank in (0, 1)]
    assert same(batches, [half[step][0] for step in range(12) for half in halves])
    continued = loader(dataset, state=batches[4].state)
    assert same(batches[5:], [update[0] for update in islice(continued, 7)])


def test_a_replacement_fits_its_slot_and_has_its_own_text(tmp_path: Path) -> None:
    dataset = damaged(tmp_path / "set")
    short = np.flatnonzero(np.array(LENGTHS) <= 400)
    texts = [f"text of {i}" for i in short]
    crops = FixedCrops(short, np.zeros(len(short), int), np.array(LENGTHS)[short], texts)
    for (batch,) in islice(loader(dataset, crops=crops), 8):
        assert torch.isfinite(batch.log_mel).all()
        for row, (ids, row_texts) in enumerate(zip(batch.ids, batch.text, strict=True)):
            used = batch.segments.length[row] > 0
            assert used.sum() == len(ids) == len(row_texts)
            for name, text, start, length in zip(
                ids, row_texts, batch.segments.start[row][used], batch.segments.length[row][used], strict=True
            ):
                recording = int(name.split(":")[0][1:])
                assert text == f"text of {recording}" and int(length) == LENGTHS[recording]
                expected = dataset.read_normalised(recording)
                assert np.array_equal(batch.log_mel[row, start : start + length].numpy(), expected)


def test_rows_are_empty_if_all_recordings_are_unreadable_until_the_limit(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", [100, 200, 300])
    for recording in range(3):
        break_recording(dataset, recording)
    (batch,) = next(iter(loader(open_dataset(dataset.path), replace(SETTINGS, rows=2, max_quarantined=3))))
    assert batch.segments.length.sum() == 0 and not batch.log_mel.any() and not any(map(len, batch.ids))
    with pytest.raises(UserError, match="3 recordings cannot be read"):
        next(iter(loader(open_dataset(dataset.path), replace(SETTINGS, rows=2, max_quarantined=2))))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_storage_failure_ends_the_run_without_quarantine(
    tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(tmp_path / "set", LENGTHS)

    def unanswered(*_: object) -> None:
        raise StorageError("https://there/shard: failed 6 times; the last time TimeoutError")

    monkeypatch.setattr(dataset.storage, "read_into", unanswered)
    stopped = loader(dataset, replace(SETTINGS, num_workers=num_workers, max_quarantined=10**6))
    with pytest.raises(UserError, match="the storage does not respond: .*failed 6 times"):
        next(iter(stopped))
    assert not stopped.quarantined


@pytest.mark.parametrize(
    "changes", [{"row": -1}, {"row": 10**9}, {"block": 10**9}, {"epoch": 1.5}, {"row": True}, {"block": "0"}]
)
def test_a_position_that_the_data_lacks_is_refused(changes: dict[str, object], dataset: Dataset) -> None:
    """It would otherwise be looked for without an end, or be that of other rows."""
    known = loader(dataset).state.to_dict()
    with pytest.raises(UserError, match=f"the state of the data .*{next(iter(changes))}"):
        next(iter(loader(dataset, state=DataState.from_dict({**known, **changes}))))


def test_the_loader_does_not_use_the_global_generator(dataset: Dataset) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(islice(loader(dataset, replace(SETTINGS, num_workers=1)), 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_shared_buffers_are_freed_with_their_last_view() -> None:
    shared = SharedBuffers(1, (2, 3, 4))
    slot = shared.take()
    assert slot == 0 and shared.take() is None
    tensor = shared.tensor(slot)
    view = tensor[1:]
    del tensor
    assert shared.take() is None
    del view
    assert shared.take() == 0


def test_insufficient_shared_memory_is_refused(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.loading.workers.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="num_workers 2 x prefetch 2 needs .* /dev/shm"):
        loader(dataset, replace(SETTINGS, num_workers=2))


def test_a_spawned_worker_gives_the_same_rows(dataset: Dataset) -> None:
    settings = replace(SETTINGS, num_workers=1, start_method="spawn")
    alone = [batch for (batch,) in islice(loader(dataset), 2)]
    assert same([batch for (batch,) in islice(loader(dataset, settings), 2)], alone)


TRAINING = """
import os, signal, sys, time
from tests.data.loading.test_loader import SETTINGS, loader, open_dataset, replace
signals = set()
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: signals.add(number))
left = 5
for number, _ in enumerate(loader(open_dataset(sys.argv[1]), replace(SETTINGS, num_workers=2))):
    if number == 1:
        print(open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read(), flush=True)
    left -= len(signals) == 2
    if left == 0:
        break
    time.sleep(0.01)
print("stopped well", flush=True)
"""


def test_signals_to_the_process_group_stop_training_without_error_output(dataset: Dataset) -> None:
    command = [sys.executable, "-c", TRAINING, str(dataset.path)]
    training = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert training.stdout is not None
    workers = training.stdout.readline().split()
    assert len(workers) == 2
    os.killpg(training.pid, signal.SIGINT)
    os.killpg(training.pid, signal.SIGTERM)
    out, err = training.communicate(timeout=PATIENCE)
    # Five more steps came after the signals: the workers ignored them.
    assert (out, err, training.returncode) == ("stopped well\n", "", 0)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_workers_end_when_the_training_process_is_killed(dataset: Dataset) -> None:
    command = [sys.executable, "-c", TRAINING, str(dataset.path)]
    training = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert training.stdout is not None
    workers = training.stdout.readline().split()
    training.kill()
    training.wait()

    def alive(worker: str) -> bool:
        status = Path(f"/proc/{worker}/status")
        return status.exists() and "State:\tZ" not in status.read_text()

    wait_until(lambda: not any(map(alive, workers)))
