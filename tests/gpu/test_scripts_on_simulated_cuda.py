"""The scripts run on a GPU, and compute there what they compute on a CPU; the device is simulated.

`python -m benchmarks.gpu_readiness` runs all combinations of settings.
"""

from pathlib import Path

import pytest
import torch

from tests.gpu.combinations import COMBINATIONS
from tests.gpu.simulated_cuda import simulated_cuda
from tests.gpu.simulated_runs import (
    differences,
    evaluate_export,
    train_on_cpu,
    train_on_simulated_cuda,
    waits_of_a_step,
)
from tests.tiny import make_dataset

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: tests marked cuda use it")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny", recordings=20, long_seconds=4.0)


QUICK = [
    "pretrain", "four codebooks", "ctc", "rnnt", "pruned rnnt and ctc", "tdt", "lstm prediction", "batch norm",
    "chunk masks, accumulation",
]  # fmt: skip


@pytest.mark.parametrize("name", QUICK)
def test_a_script_computes_on_the_device_what_it_computes_on_a_cpu(name: str, dataset: Path, tmp_path: Path) -> None:
    """Losses and gradient norms of 3 steps to 5 digits, validation included."""
    script, *more = COMBINATIONS[name]
    cpu = train_on_cpu(script, dataset, tmp_path / "cpu", *more)
    cuda = train_on_simulated_cuda(script, dataset, tmp_path / "cuda", *more)
    assert differences(cpu, cuda) == []
    assert cuda.gpu is not None and cuda.gpu.kernels > 1000
    assert len(cuda.step_waits) == 2 and sum(waits_of_a_step(cuda).values()) > 0


@pytest.mark.parametrize("name", ["ctc", "pruned rnnt and ctc", "tdt", "fast emit"])
def test_the_host_waits_at_most_once_in_a_step_of_two_micro_batches(name: str, dataset: Path, tmp_path: Path) -> None:
    """In a step that neither logs nor saves; the read of the last step's outcome is the one wait."""
    script, *more = COMBINATIONS[name]
    quiet = ["--run.steps=4", "--run.log_every=1000", "--accumulation=2"]
    waits = waits_of_a_step(train_on_simulated_cuda(script, dataset, tmp_path, *more, *quiet))
    assert sum(waits.values()) <= 1, waits


def test_a_difference_is_found(dataset: Path, tmp_path: Path) -> None:
    cpu = train_on_cpu("finetune_ctc", dataset, tmp_path / "cpu", "--run.steps=1")
    other = train_on_cpu("finetune_ctc", dataset, tmp_path / "other", "--run.steps=1", "--run.seed=1")
    assert any(" loss: " in difference for difference in differences(cpu, other))
    assert any(" grad_norm: " in difference for difference in differences(cpu, other))
    assert differences(cpu, cpu) == []


@pytest.mark.parametrize("script", ["finetune_ctc", "finetune_rnnt"])
def test_evaluation_on_the_device_finds_the_words_found_on_a_cpu(script: str, dataset: Path, tmp_path: Path) -> None:
    train_on_simulated_cuda(script, dataset, tmp_path / "run", "--run.steps=1")
    export, short = tmp_path / "run" / "export", ["--data.max_recordings=1"]
    cpu = evaluate_export(export, dataset, tmp_path / "cpu", "cpu", *short)
    with simulated_cuda() as gpu:
        cuda = evaluate_export(export, dataset, tmp_path / "cuda", "auto", *short)
    assert gpu.kernels > 100 and cuda["recordings"] == cpu["recordings"]
