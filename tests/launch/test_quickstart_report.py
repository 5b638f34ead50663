"""Pretraining section of the report of the quickstart."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.paths import REPOSITORY


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("quickstart_report", REPOSITORY / "launch/quickstart_report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("validates", [False, True])
def test_training_and_held_out_curves_share_their_figures(script: Any, validates: bool, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"step": step, "kind": "train", "loss": 6.5 - step / 10, "accuracy": step / 100, "unigram_entropy": 5.9}
        for step in range(1, 4)
    ]
    if validates:
        rows += [{"step": step, "kind": "dev", "dev_loss": 6.75, "dev_accuracy": 0.125} for step in (2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = str(script.pretraining_section(tmp_path).body)
    assert "training: 6.2 at 3" in page and "training: 0.03 at 3" in page
    assert ("held-out: 6.75 at 3" in page) == ("held-out: 0.125 at 3" in page) == validates
