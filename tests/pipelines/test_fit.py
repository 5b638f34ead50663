"""Search for the largest rows that fit, on functions, by dry runs and on a GPU; options of the command line."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pretrain
from bestrq.model.activation_checkpointing import MODES
from bestrq.training.process import World
from common.config import parse
from common.errors import UserError
from pipelines import fit, preview
from pipelines.fit import advice, find_counted, find_measured, largest_rows, measured_bytes, one_row, settings_for
from tests.pipelines.test_dry_run import configure, count

ROOM = 1000.0


def out_of_memory_at(limit: int, slope: float) -> Callable[[int], float]:
    return lambda rows: math.inf if rows > limit else slope * rows


@pytest.mark.parametrize(
    "needed",
    [
        lambda rows: 300 + 7 * rows,
        lambda rows: 999 + 2 * rows,  # no row fits
        lambda rows: 990 + 10 * rows,  # exactly one
        lambda rows: max(400 + 3 * rows, 100 + 9 * rows),  # the backward pass is the peak with many rows only
        lambda rows: rows**2 / 50,
        lambda rows: rows**0.5,  # never reaches the budget
        lambda rows: 8 * -(-rows // 16) * 16,  # in steps, as of an allocator
        out_of_memory_at(37, 5),
        out_of_memory_at(1, 5),
        out_of_memory_at(0, 5),
    ],
)
def test_the_search_finds_the_largest_number_within_the_budget_in_few_trials(needed: Callable[[int], float]) -> None:
    calls: list[int] = []

    def counted(rows: int) -> float:
        calls.append(rows)
        return needed(rows)

    rows, found = largest_rows(counted, ROOM)
    fitting = [n for n in range(1, fit.MOST_ROWS + 1) if needed(n) <= ROOM]
    assert rows == max(fitting, default=0)
    assert found == needed(rows or 1)
    assert len(calls) <= 16 and len(set(calls)) == len(calls)


@pytest.mark.parametrize("rows", [1, 16, 30, 32, 1000])
@pytest.mark.parametrize("fitting", [1, 3, 14])
@pytest.mark.parametrize("processes", [1, 8, 24])
def test_the_settings_divide_the_rows_among_processes_with_the_least_accumulation(
    rows: int, fitting: int, processes: int
) -> None:
    total, accumulation = settings_for(rows, fitting, processes)
    shares = processes * accumulation
    assert rows <= total < rows + shares and total % shares == 0 and total // shares <= fitting
    assert accumulation == 1 or rows > processes * (accumulation - 1) * fitting


def test_one_more_row_than_the_counted_fit_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "MODES", ("none",))
    config = configure("pretrain", "--data.rows=64")
    gib = 1.2 * count(configure("pretrain", "--data.rows=8"), 1).peak / 2**30
    (found,) = find_counted(config, gib, 1, 8)
    budget = fit.COUNTED_SHARE * gib * 2**30
    peaks = [count(configure("pretrain", f"--data.rows={found.rows + more}"), 1).peak for more in (0, 1)]
    assert peaks[0] == found.bytes <= budget < peaks[1]


def test_the_advice_is_the_first_mode_that_fits_from_that_of_the_recipe_on() -> None:
    config: Any = configure("pretrain")
    figures = [{"activation_checkpointing": mode, "rows": rows, "data.rows": 16, "accumulation": 2}
               for mode, rows in zip(MODES, (0, 4, 9), strict=True)]  # fmt: skip
    text = advice(figures, config, 2)
    assert "--data.rows 16 --accumulation 2 --encoder.activation_checkpointing selective (at most --data.rows 8" in text
    assert "No row fits" in advice([entry | {"rows": 0} for entry in figures], config, 2)


def test_a_trial_out_of_memory_is_halved_and_its_memory_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial needs 10 bytes per row; more than 21 rows run out of memory."""
    now: list[int] = []

    class Trial:
        def __init__(self, config: Any, shape: Any, *_: Any) -> None:
            if shape.rows > 21:
                raise torch.OutOfMemoryError("CUDA out of memory")
            now.append(10 * shape.rows)

        def run(self) -> None:
            pass

    monkeypatch.setattr(fit, "TrialStep", Trial)
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: now[-1])
    config = configure("pretrain")
    needed = measured_bytes(config, one_row(config), World(device=torch.device("cuda", 0)), False)
    assert largest_rows(needed, 1e9) == (21, 210)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_measured_fit_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "MOST_ROWS", 8)
    (found,) = find_measured(configure("pretrain", "--encoder.compile=false"), 1)
    assert found.rows == 8 and found.bytes > 0


def test_a_fit_without_a_gpu_or_with_shards_is_an_error_that_names_the_other_way() -> None:
    config = configure("pretrain", "--distributed.device=cpu")
    with pytest.raises(UserError, match="on a GPU, not a CPU: give --fit.memory_gib, such as 24"):
        find_measured(config, 1)


def test_previews_do_not_change_the_settings_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--data.rows=24", "--distributed.strategy=hsdp", "--distributed.shard_size=2"]
    monkeypatch.setattr("sys.argv", ["pretrain.py", *arguments])
    assert preview.parse_or_preview(pretrain.Config, None) == parse(pretrain.Config, arguments)
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr("pipelines.dry_run.report", lambda config, *rest: calls.append((config.data.rows, *rest)))
    monkeypatch.setattr("pipelines.fit.report", lambda config, *rest: calls.append((config.data.rows, *rest)))
    for more in (["--dry_run.world_size=256"], ["--fit.memory_gib=24", "--dry_run.world_size=8"], ["--fit"]):
        monkeypatch.setattr("sys.argv", ["pretrain.py", *arguments, *more])
        assert preview.parse_or_preview(pretrain.Config, None) is None
    assert calls == [(24, 256, 8), (24, 24.0, 8, 8), (24, 0.0, 1, 8)]
