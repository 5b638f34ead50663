"""What benchmarks.context_cost compares is comparable, and what it leaves out it says."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

from benchmarks.context_cost import Cell, measure, parse_arguments, plan
from bestrq.model.presets import PRESETS


def test_cells_differ_in_context_not_in_audio_and_what_is_left_out_is_named() -> None:
    arguments = "--durations 10 60 3600 --batch-seconds 120 --full-limit 60 --train-limit 60 --other-limit 10"
    cells, left_out = plan(parse_arguments([*arguments.split(), "--systems", "window", "full", "torchaudio"]))
    audio = {(cell.system, cell.mode, cell.duration): cell.rows * cell.duration for cell in cells}
    short, ours = (10, 60), ("window", "full")
    expected = {(system, mode, d): 120 for system in ours for mode in ("forward", "train") for d in short}
    expected |= {("torchaudio", mode, 10): 120 for mode in ("forward", "train")}
    assert audio == expected | {("window", "forward", 3600): 3600}
    assert len(cells) + len(left_out) == 18 and "full_forward_3600s" in left_out
    assert {cell.settings.mask for cell in cells if cell.system == "window"} == {"window"}


def test_a_cell_has_a_time_and_a_peak_that_grows_with_what_is_kept_for_training() -> None:
    settings = replace(PRESETS["quickstart"], num_layers=1, mask="window")
    # In a process of its own, as nothing was freed there that would be used again unseen.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        forward, train = (
            process.submit(measure, Cell("window", mode, 30, 2, settings), 1, 1).result()
            for mode in ("forward", "train")
        )
    assert forward.milliseconds > 0 and 0 < 2 * forward.megabytes < train.megabytes
