"""Run-time estimate of the quickstart, from measured steps of its recipes."""

import importlib.util
from typing import Any

import pytest

from bestrq.training.process import World
from common.config import load_yaml
from tests.paths import REPOSITORY


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("quickstart_estimate", REPOSITORY / "launch/quickstart_estimate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("head", ["ctc", "rnnt"])
def test_the_estimate_measures_steps_on_this_machine(script: Any, head: str) -> None:
    seconds, precision = script.estimate(head, 1, 1, World())
    assert 0 < seconds < float("inf") and precision.name in ("float32", "bfloat16")


def test_the_estimate_is_the_time_of_all_steps_plus_the_rest(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "step_seconds", lambda *_: 0.1)
    steps = [load_yaml(REPOSITORY / f"configs/quickstart-{name}.yaml")["run"]["steps"] for name in ("pretrain", "ctc")]
    total = script.LOOP_FACTOR * (steps[0] + 2 * steps[1]) + script.REST["ctc"]
    assert script.estimate("ctc", 0, 5, World())[0] == pytest.approx(0.1 * total)
