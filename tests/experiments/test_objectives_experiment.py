"""experiments/objectives.sh with a stand-in for python, as its programs have tests of their own; its table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bestrq.report.result_files import folders_by_name
from common.config import parse
from common.errors import UserError
from experiments import objectives_table
from pipelines.pretraining import Config
from tests.experiments.test_learning_intervals import write
from tests.paths import REPOSITORY
from tools import gauge

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
    folder = tmp_path_factory.mktemp("objectives")
    python, notes = folder / "python", folder / "notes"
    python.write_text(PROGRAM.format(notes=str(notes)))
    python.chmod(0o755)
    for _ in range(2):
        done = subprocess.run(
            ["bash", "experiments/objectives.sh", "--folder", folder / "runs"],
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
    assert list(judged) == list(trained)[:12] and len(judged) == 12
    for name in judged:
        config = trained[name]
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


def test_objectives_differ_in_nothing_else(programs: list[list[str]]) -> None:
    configs = [parse(Config, words) for words in of(programs, "pretrain.py")]
    assert len(configs) == 20 and len({Path(config.run.folder).parent.name for config in configs}) == 20
    same = [repr((c.data, c.optimizer, c.run.steps, c.run.seed, c.encoder.dim, c.encoder.num_layers)) for c in configs]
    assert len(set(same)) == 1
    # No objective is the same as another one by mistake, such as with a setting that is ignored.
    assert len({repr((c.quantizer, c.targets, c.masking, c.encoder)) for c in configs}) == 20
    tuned = of(programs, "finetune_ctc.py")
    different = {"--run.folder", "--finetune.init", "--run.seed"}
    rest = [[w for k, w in enumerate(words) if not different & set(words[max(0, k - 1) : k + 1])] for words in tuned]
    of_scratch = [words for words in rest if "--finetune.reinitialise_top_blocks" not in words]
    assert len(of_scratch) == 3 and len(rest) == 43  # the teacher; two seeds of scratch and of 20 encoders
    assert len({tuple(words) for words in of_scratch}) == 1
    assert len({tuple(words) for words in rest if words not in of_scratch}) == 1


def test_every_evaluation_is_made_once_and_enters_table_and_correlation(programs: list[list[str]]) -> None:
    evaluated = [option(words, "--out") for words in of(programs, "evaluate.py")]
    assert len(evaluated) == 42
    for words in of(programs, "evaluate.py"):
        assert option(words, "--out").startswith(str(Path(option(words, "--export")).parents[1]))
    pairs = {}
    for module in ("experiments.objectives_table", "tools.gauge_correlation"):
        (words,) = of(programs, module)
        last = min(words.index(name) for name in ("--out", "--baseline") if name in words)
        pairs[module] = folders_by_name("--results", words[words.index("--results") + 1 : last])
    table, correlated = pairs.values()
    assert [folder for folders in table.values() for folder in folders] == evaluated
    assert list(table)[:12] == list(correlated) and all(table[name] == correlated[name] for name in correlated)


def test_the_table_has_reductions_against_the_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def results(name: str, errors: int) -> str:
        return ",".join(str(write(tmp_path / f"{name}-{seed}", "es", errors, seed)) for seed in range(2))

    pairs = [f"{name}={results(name, errors)}" for name, errors in (("worse", 4), ("base", 3), ("better", 1))]
    out = tmp_path / "out/objectives.json"
    objectives_table.main(["--results", *pairs, "--baseline", "base", "--out", str(out)])
    rows = json.loads(out.read_text())["objectives"]
    assert rows["better"]["value"] == pytest.approx(1 - 5 / 13) and rows["base"]["value"] == 0
    assert rows["worse"]["value"] < 0 < rows["better"]["low"]
    printed = capsys.readouterr().out
    lines = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| `")]
    assert lines == ["`better`", "`base`", "`worse`"]
    with pytest.raises(UserError, match="--baseline other: give one of worse, base, better"):
        objectives_table.main(["--results", *pairs, "--baseline", "other", "--out", str(out)])
    with pytest.raises(UserError, match="each name once"):
        objectives_table.main(["--results", pairs[0], pairs[0], "--baseline", "worse", "--out", str(out)])
