"""benchmarks.rnnt_loss: all systems have the same loss; missing packages and a lack of memory are reported."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch

from benchmarks import rnnt_loss as benchmark
from benchmarks.rnnt_loss_peers import PACKAGES, torchaudio_loss

TINY = "--segments 2 --frames 30 --labels 6 --joint-dim 8 --rounds 1 --repeats 1 --threads 1"


def cell(system: str, dtype: str = "float32") -> benchmark.Cell:
    arguments = [*TINY.split(), "--vocab-sizes", "20", "--systems", system, "--dtypes", dtype]
    return benchmark.plan(benchmark.parse_arguments(arguments))[0]


def test_ours_and_torchaudio_have_the_same_loss_and_gradients() -> None:
    ours, theirs = (benchmark.draw_problem(cell("ours"), 30, 6) for _ in range(2))
    losses = benchmark.our_loss(ours, cell("ours")), torchaudio_loss(theirs)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for own, other in zip(
        (ours.encoded, ours.predicted, *ours.output.parameters()),
        (theirs.encoded, theirs.predicted, *theirs.output.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_both_tdt_losses_have_the_same_loss_and_gradients() -> None:
    problems, losses = [], []
    for system in ("ours_tdt", "ours_tdt_outputs"):
        problems.append(benchmark.draw_problem(cell(system), 30, 6))
        losses.append(benchmark.our_loss(problems[-1], cell(system)))
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    parts = ([p.encoded, p.predicted, *p.output.parameters(), *p.durations.parameters()] for p in problems)
    for own, other in zip(*parts, strict=True):
        assert own.grad is not None and own.grad.abs().max() > 0
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_ratios_compare_each_system_with_its_peer() -> None:
    args = benchmark.parse_arguments([*TINY.split(), "--vocab-sizes", "20", "--dtypes", "float32"])
    costs = {"ours": 1.0, "torchaudio": 2.0, "ours_tdt": 3.0, "ours_tdt_outputs": 6.0, "transformers_tdt": 12.0}
    made = {f"float32_20_{name}": benchmark.Cost(x, 10 * x, 100 * x, 1.0) for name, x in costs.items()}
    result = benchmark.ratios(args, dict(made))
    for measure in ("memory", "time", "processor"):
        assert result[f"{measure}_ratio_to_torchaudio"] == 0.5
        assert result[f"{measure}_ratio_to_transformers_tdt"] == 0.25
        assert result[f"outputs_{measure}_ratio_to_transformers_tdt"] == 0.5
    assert result["tdt_matmul_share"] > 0 and 0 < result["ours_tdt_states_share"] <= 1


def test_different_losses_are_an_error() -> None:
    cost = {
        "float32_20_ours": benchmark.Cost(1.0, 1.0, 1.0, 100.0),
        "float32_20_ours_pruned": benchmark.Cost(1.0, 1.0, 1.0, 300.0),
    }
    benchmark.check_losses({**cost, "float32_20_torchaudio": benchmark.Cost(1.0, 1.0, 1.0, 100.01)})
    benchmark.check_losses({**cost, "float32_20_ours_tdt": benchmark.Cost(1.0, 1.0, 1.0, 40.0)})  # another model
    with pytest.raises(RuntimeError, match="differ"):
        benchmark.check_losses({**cost, "float32_20_torchaudio": benchmark.Cost(1.0, 1.0, 1.0, 120.0)})


def test_the_json_line_has_the_ratios_and_missing_packages_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGES, "fast_rnnt", "missing_package")
    arguments = "--vocab-sizes 20 --dtypes float32 --systems ours torchaudio fast_rnnt"
    benchmark.main([*TINY.split(), *arguments.split()])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("fast_rnnt is skipped: missing_package is not installed")
    result = json.loads(lines[-1])
    assert result["time_ratio_to_torchaudio"] > 0 and result["float32_20_ours_seconds"] > 0
    assert 0 < result["ours_states_share"] <= 1 and "float32_20_fast_rnnt_seconds" not in result


def test_a_system_beyond_the_memory_budget_has_no_cost() -> None:
    # In a new process, whose address space is limited; outputs and their gradient take 670 MB.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        large = replace(cell("torchaudio"), vocab_size=200_000)
        assert process.submit(benchmark.measure, large, 1, 1, 400_000_000).result() is None
