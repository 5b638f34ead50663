"""experiments/gauge_correlation.sh, with a stand-in for python: its programs have tests of their own."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from common.config import parse
from pipelines.pretraining import Config
from tests.paths import REPOSITORY
from tools import gauge, gauge_correlation

# Notes every program, and makes the file that shows that it has finished.
PROGRAM = f"""#!{sys.executable}
import json, pathlib, sys
words = sys.argv[1:]
with open({{notes!r}}, "a") as file:
    file.write(json.dumps(words) + "\\n")
if "evaluate.py" in words:
    out = pathlib.Path(words[words.index("--out") + 1])
    out.mkdir(parents=True)
    (out / "results.json").write_text("{{{{}}}}")
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Arguments of all programs that the script starts, in order; a second call of the script starts no evaluation."""
    folder = tmp_path_factory.mktemp("correlation")
    python, notes = folder / "python", folder / "notes"
    python.write_text(PROGRAM.format(notes=str(notes)))
    python.chmod(0o755)
    for _ in range(2):
        done = subprocess.run(
            ["bash", "experiments/gauge_correlation.sh", "--folder", folder / "runs"],
            cwd=REPOSITORY, env={**os.environ, "PYTHON": str(python)}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-5000:]
    return [json.loads(line) for line in notes.read_text().splitlines()]


def of(programs: list[list[str]], script: str) -> list[list[str]]:
    """Arguments after the name of a script or module, of the first call of the shell script."""
    found = [words[words.index(script) + 1 :] for words in programs if script in words]
    return found if script == "evaluate.py" else found[: len(found) // 2]


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_the_gauge_judges_the_very_targets_that_are_trained(programs: list[list[str]]) -> None:
    configs = [parse(Config, words) for words in of(programs, "pretrain.py")]
    trained = {Path(config.run.folder).parent.name: config for config in configs}
    (words,) = of(programs, "tools.gauge")
    judged = gauge.read_targets(words[words.index("--targets") + 1 :])
    assert list(judged) == list(trained) and len(judged) == 12
    for name, config in trained.items():
        settings, quantizer, targets = judged[name].with_defaults(), config.quantizer, config.targets
        if settings.export:
            assert (targets.source, targets.export) == ("teacher", settings.export), name
            assert (targets.kind, targets.clusters) == (settings.kind, settings.clusters or targets.clusters), name
            continue
        assert targets.source == "quantizer"
        for field in ("codebook_size", "num_codebooks", "whitening"):
            assert getattr(settings, field) == getattr(quantizer, field), (name, field)
        assert (settings.kind == "random") == (not quantizer.pca_steps), name
        assert len(quantizer.refine_steps) == (settings.refinements if settings.kind == "refined" else 0), name


def test_targets_differ_in_nothing_else(programs: list[list[str]]) -> None:
    configs = [parse(Config, words) for words in of(programs, "pretrain.py")]
    assert len({repr((c.data, c.encoder, c.optimizer, c.masking, c.run.steps, c.run.seed)) for c in configs}) == 1
    tuned = [words for words in of(programs, "finetune_ctc.py") if "--finetune.init" in words]
    different = {"--run.folder", "--finetune.init", "--run.seed", "--data.seed"}
    rest = {
        shlex.join(w for k, w in enumerate(words) if not different & set(words[max(0, k - 1) : k + 1]))
        for words in tuned
    }
    assert len(rest) == 1 and len(tuned) == 24


def test_every_target_is_evaluated_once_with_both_seeds_and_its_mean_is_correlated(programs: list[list[str]]) -> None:
    evaluated = [option(words, "--out") for words in of(programs, "evaluate.py")]
    (words,) = of(programs, "tools.gauge_correlation")
    pairs = [pair.partition("=")[::2] for pair in words[words.index("--results") + 1 : words.index("--out")]]
    assert [folder for _, folders in pairs for folder in folders.split(",")] == evaluated
    for words in of(programs, "evaluate.py"):
        assert option(words, "--out").startswith(str(Path(option(words, "--export")).parents[1]))
    assert len(pairs) == 12 and gauge_correlation.MIN_TARGETS <= 12
