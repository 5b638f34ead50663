"""Compiled blocks lowered for GPUs without one. Slow: LOWER_KERNELS=1 runs them."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.lowered_kernels import GPUS, RECIPES, Kernel, figures, lower_recipe
from tests.paths import REPOSITORY

slow = pytest.mark.skipif(
    "LOWER_KERNELS" not in os.environ, reason="takes one to two minutes a recipe: set LOWER_KERNELS=1"
)
TINY = """
import os, sys, json, torch
from dataclasses import replace
from benchmarks import lowered_kernels
from bestrq.model.settings import EncoderSettings

torch.set_num_threads(1)
gpu = lowered_kernels.GPUS["h100"]
gpu.shared_memory_per_block_optin = int(sys.argv[1])
settings = EncoderSettings(dim=64, num_heads=1, feedforward_dim=128, attention_dropout=0.0, backend="flex")
kernels = lowered_kernels.lower_block(settings, 2, 512, "none", gpu)
print(json.dumps(lowered_kernels.figures(kernels)), flush=True)
os._exit(0)
"""


@slow
@pytest.mark.parametrize(("gpu", "target"), [("h100", "sm_90a"), ("a100", "sm_80")])
@pytest.mark.parametrize(("name", "backend"), RECIPES)
def test_all_kernels_of_a_recipe_compile(name: str, backend: str, gpu: str, target: str) -> None:
    found = lower_recipe(name, backend, gpu)
    assert found["kernels_not_compiled"] == 0 and found["targets"] == [target]
    limit = GPUS[gpu].shared_memory_per_block_optin
    assert found["kernels"] > 30 and 0 < found["largest_shared_bytes"] <= limit


@slow
def test_kernels_over_the_limit_of_shared_memory_are_counted() -> None:
    result = subprocess.run(
        [sys.executable, "-c", TINY, "20000"], capture_output=True, encoding="utf-8", cwd=REPOSITORY, check=True
    )
    found = json.loads(result.stdout.splitlines()[-1])
    assert 0 < found["kernels_not_compiled"] < found["kernels"] and found["largest_shared_bytes"] > 20000


def test_figures_count_errors_and_kernels_over_the_limit() -> None:
    kernels = [
        Kernel("a", 4, 1, 100, "sm_90a", 1000),
        Kernel("b", 4, 3, 1001, "sm_90a", 1000),
        Kernel("c", 4, 1, 0, "", 1000, "CompilationError: no"),
    ]
    assert figures(kernels) == {
        "kernels": 3, "kernels_not_compiled": 2, "largest_shared_bytes": 1001,
        "largest_shared_kernel": "b", "targets": ["sm_90a"],
    }  # fmt: skip
