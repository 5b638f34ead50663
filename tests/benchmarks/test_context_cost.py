"""benchmarks.context_cost: equal work for all contexts, skipped cells, and measured costs."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch

from benchmarks.context_cost import Cell, make_forward, measure, parse_arguments, plan, run_pass
from bestrq.model.presets import PRESETS
from pipelines.live_bytes import LiveBytes


def test_cells_have_the_same_amount_of_audio_and_skipped_cells_are_listed() -> None:
    arguments = "--durations 10 60 3600 --batch-seconds 120 --full-limit 60 --train-limit 60 --other-limit 10"
    cells, left_out = plan(parse_arguments([*arguments.split(), "--systems", "window", "full", "torchaudio"]))
    audio = {(cell.system, cell.mode, cell.duration): cell.rows * cell.duration for cell in cells}
    short, ours = (10, 60), ("window", "full")
    expected = {(system, mode, d): 120 for system in ours for mode in ("forward", "train") for d in short}
    expected |= {("torchaudio", mode, 10): 120 for mode in ("forward", "train")}
    assert audio == expected | {("window", "forward", 3600): 3600}
    assert len(cells) + len(left_out) == 18 and "full_forward_3600s" in left_out
    assert {cell.settings.mask for cell in cells if cell.system == "window"} == {"window"}


SETTINGS = replace(PRESETS["quickstart"], num_layers=1, mask="window")


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_cell_is_measured_in_a_separate_process(mode: str) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        cost = process.submit(measure, Cell("window", mode, 30, 2, SETTINGS), 1, 1).result()
    assert cost.milliseconds > 0


def test_a_training_pass_keeps_tensors_for_its_backward_pass() -> None:
    """Bytes of tensors are counted, since they do not depend on the allocator."""
    peaks = {}
    for mode in ("forward", "train"):
        model, forward = make_forward(Cell("window", mode, 30, 2, SETTINGS))
        model.train(mode == "train")
        mel, length = torch.randn(2, 3000, SETTINGS.num_mels), torch.full((2, 1), 3000)
        with LiveBytes() as live:
            run_pass(forward, mel, length, mode == "train")
        peaks[mode] = live.peak
    assert 0 < 2 * peaks["forward"] < peaks["train"]
