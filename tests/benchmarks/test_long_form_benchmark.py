"""benchmarks.long_form: all modes run, skipped cells are listed, and recordings do not depend on windows."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest
import torch

from benchmarks.long_form import SYSTEMS, Cost, main, measure, parse_arguments, plan, read_mel, summarise

TINY = "--preset quickstart --layers 1 --vocab-size 8 --context-seconds 2 --batch-seconds 4 --threads 1"


def test_the_json_line_has_the_documented_keys(capsys: pytest.CaptureFixture[str]) -> None:
    main([*TINY.split(), *"--minutes 0.05 --systems chunked buffered".split()])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("chunked_0.05min", "buffered_0.05min"):
        assert result[f"{name}_rtf"] > 0 and result[f"{name}_mb"] >= 0
    assert {"cost_0.05min_over_0.05min", "memory_0.05min_over_0.05min", "buffered_over_chunked"} <= result.keys()


def test_every_mode_runs() -> None:
    cells, left_out = plan(parse_arguments([*TINY.split(), "--minutes", "0.05"]))
    assert [cell.system for cell in cells] == list(SYSTEMS) and not left_out
    # In a new process, since `measure` changes the allocator of its process.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        assert all(cost.milliseconds > 0 for cost in process.map(partial(measure, threads=1), cells))


def test_cells_beyond_the_limits_are_listed_as_skipped() -> None:
    cells, left_out = plan(parse_arguments([]))
    assert len(cells) + len(left_out) == 18
    assert left_out == ["whole_60min", "whole_180min", "window_180min"]
    assert {cell.encoder.mask for cell in cells if cell.system == "streaming"} == {"chunk"}
    assert {cell.inference.overlap for cell in cells if cell.system == "chunked"} == {0.0}


def test_ratios_compare_the_longest_with_the_shortest_recording() -> None:
    costs = {"buffered_10min": Cost(20, 100), "buffered_180min": Cost(22, 110), "chunked_180min": Cost(16, 90)}
    result = summarise(costs, [180, 10])
    assert result["cost_180min_over_10min"] == result["memory_180min_over_10min"] == 1.1
    assert result["buffered_over_chunked"] == 1.375


def test_a_random_recording_does_not_depend_on_the_window() -> None:
    whole = read_mel(4, 0, 3500)
    assert whole.shape == (3500, 4)
    for start, stop in ((0, 1), (999, 1001), (1000, 2000), (3499, 3500)):
        assert torch.equal(read_mel(4, start, stop), whole[start:stop])
