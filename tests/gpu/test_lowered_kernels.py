"""Compiled blocks lowered for an H100 without one. Slow: LOWER_KERNELS=1 runs them."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.lowered_kernels import RECIPES, SHARED_MEMORY, Kernel, figures, lower_recipe
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
lowered_kernels.SHARED_MEMORY = int(sys.argv[1])
settings = EncoderSettings(dim=64, num_heads=1, feedforward_dim=128, attention_dropout=0.0, backend="flex")
kernels = lowered_kernels.lower_block(settings, 2, 512, "none")
print(json.dumps(lowered_kernels.figures(kernels)), flush=True)
os._exit(0)
"""


@slow
@pytest.mark.parametrize(("name", "backend"), RECIPES)
def test_all_kernels_of_a_recipe_compile_for_an_h100(name: str, backend: str) -> None:
    found = lower_recipe(name, backend)
    assert found["kernels_not_compiled"] == 0 and found["targets"] == ["sm_90a"]
    assert found["kernels"] > 30 and 0 < found["largest_shared_bytes"] <= SHARED_MEMORY


@slow
def test_kernels_over_the_limit_of_shared_memory_are_counted() -> None:
    result = subprocess.run(
        [sys.executable, "-c", TINY, "20000"], capture_output=True, encoding="utf-8", cwd=REPOSITORY, check=True
    )
    found = json.loads(result.stdout.splitlines()[-1])
    assert 0 < found["kernels_not_compiled"] < found["kernels"] and found["largest_shared_bytes"] > 20000


def test_figures_count_errors_and_kernels_over_the_limit() -> None:
    kernels = [
        Kernel("a", 4, 1, 100, "sm_90a"),
        Kernel("b", 4, 3, SHARED_MEMORY + 1, "sm_90a"),
        Kernel("c", 4, 1, 0, "", "CompilationError: no"),
    ]
    assert figures(kernels) == {
        "kernels": 3, "kernels_not_compiled": 2, "largest_shared_bytes": SHARED_MEMORY + 1,
        "largest_shared_kernel": "b", "targets": ["sm_90a"],
    }  # fmt: skip
