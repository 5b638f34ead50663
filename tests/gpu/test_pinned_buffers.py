"""Page-locked buffers of the loader, on the simulated device and on a GPU."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from data.loading.loader import LoaderSettings, RowLoader
from data.loading.pinned import PinnedBuffers
from tests.gpu.cuda_api import Event
from tests.gpu.simulated_cuda import SimulatedCuda, simulated_cuda
from tests.made_datasets import make_dataset

SIMULATED = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: tests marked cuda use it")
SETTINGS = LoaderSettings(row_frames=400, rows=2, max_segments=4, block_crops=20, min_seconds=0.5, max_seconds=4.0)


@pytest.fixture
def gpu() -> Iterator[SimulatedCuda]:
    with simulated_cuda() as gpu:
        yield gpu


@SIMULATED
def test_a_buffer_is_reused_after_the_copies_issued_before_its_deletion(
    gpu: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = False
    monkeypatch.setattr(Event, "query", lambda event: finished)
    buffers = PinnedBuffers(1, (2, 3, 4))
    finished = True
    assert buffers.take() == 0
    tensor = buffers.tensor(0)
    assert tensor.is_pinned() and tensor.pin_memory() is tensor
    finished = False
    del tensor
    assert buffers.take() is None
    finished = True
    assert buffers.take() == 0 and buffers.take() is None


@SIMULATED
def test_memory_is_unlocked_with_the_last_tensor(gpu: SimulatedCuda) -> None:
    buffers = PinnedBuffers(2, (2, 3, 4))
    view = buffers.tensor(1)[1:]
    assert list(gpu.registered) == [buffers.buffers[1].data_ptr()], "locked on the first use only"
    del buffers
    gc.collect()
    assert len(gpu.registered) == 1 and view.is_pinned()
    del view
    gc.collect()
    assert gpu.registered == {}


@SIMULATED
def test_buffers_stay_pageable_if_no_more_memory_can_be_locked(
    gpu: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda.cudart(), "cudaHostRegister", lambda *args: 2)
    buffers = PinnedBuffers(2, (2, 3, 4))
    for buffer in (0, 1):
        tensor = buffers.tensor(buffer)
        assert not tensor.is_pinned()
        tensor.fill_(buffer)
        assert torch.equal(tensor, buffers.buffers[buffer])
    assert len(caplog.messages) == 1 and "pinned memory" in caplog.messages[0]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "simulated",
    [pytest.param(True, marks=SIMULATED),
     pytest.param(False, marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])],
    ids=["simulated", "cuda"],
)  # fmt: skip
def test_batches_arrive_pinned_and_copies_hold_their_frames(simulated: bool, num_workers: int, tmp_path: Path) -> None:
    """Many more batches than buffers, each deleted directly after its copy was issued."""
    dataset = make_dataset(tmp_path / "set", [60 + 7 * i for i in range(40)])

    def batches(num_workers: int) -> Iterator[torch.Tensor]:
        settings = replace(SETTINGS, num_workers=num_workers)
        loader = RowLoader(dataset, settings.crop_order(dataset), settings, multiple=4, row_gap=4)
        return (micro_batches[0].log_mel for micro_batches in loader)

    expected = list(islice(batches(0), 30))

    def check() -> None:
        copies = []
        for log_mel in islice(batches(num_workers), 30):
            assert log_mel.is_pinned()
            copies.append(log_mel.to("cuda", non_blocking=True))
            del log_mel
        for copy, frames in zip(copies, expected, strict=True):
            assert torch.equal(copy.cpu(), frames)

    if not simulated:
        torch.zeros(1, device="cuda")
        return check()
    with simulated_cuda() as gpu:
        check()
        gc.collect()
        assert gpu.registered == {} and gpu.pageable == {}
