"""experiments/long_context.sh: from corpora to the table; rows per step, tasks of a job array, errors."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from bestrq.report.result_files import FORMAT_VERSION
from data.format.dataset import open_dataset
from data.splits.published import published_split
from tests.corpora_speech import encoded, put, speech
from tests.launch.test_launch import SCONTROL, SRUN, Running, write_program
from tests.made_results import completed
from tests.paths import REPOSITORY
from tests.patience import wait_until
from tests.quick_python import quick_python

CONTEXTS, EVALUATE = "experiments/long_context.sbatch", "launch/evaluate.sbatch"
FINISH = ("-m experiments.long_context_table", "-m tools.compare")
STM = """\
{0} 1 inter_segment_gap 0 0.50 <o,,unknown> ignore_time_segment_in_scoring
{0} 1 {0} 0.50 4.00 <o,f0,female> i share with you
{0} 1 {0} 4.00 7.90 <o,f0,female> a discovery (2) that i made
"""
NLP = "token|speaker|ts|endTs|punctuation|prepunctuation|case|tags\r\nGood|1|||||CA|[]\r\nmorning|1|||.||LC|[]\r\n"
METADATA = "File ID,Country by Ticker,Major Dialect Family\n"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny TED-LIUM with all dev and test talks and two training talks; Earnings-22 with its 12 calls and another."""
    folder = tmp_path_factory.mktemp("downloaded")
    waveform = np.zeros(8 * 16000, np.float32)
    spoken = speech("share with you a discovery")
    waveform[8000 : 8000 + len(spoken)] = spoken
    talk = folder / "talk.sph"
    soundfile.write(talk, waveform, 16000, format="NIST", subtype="PCM_16")
    for split, talks in (("train", ["A_2010", "B_2011"]), *published_split("tedlium").items()):
        for name in talks:
            put(folder / f"TEDLIUM/legacy/{split}/stm/{name}.stm", STM.format(name))
            (folder / f"TEDLIUM/legacy/{split}/sph").mkdir(exist_ok=True)
            (folder / f"TEDLIUM/legacy/{split}/sph/{name}.sph").symlink_to(talk)
    calls = [id for ids in published_split("earnings22").values() for id in ids] + ["Another-Call"]
    for id in calls:
        put(folder / f"earnings22/media/{id}.mp3", encoded("good morning", "mp3"))
        put(folder / f"earnings22/transcripts/nlp_references/{id}.nlp", NLP)
    put(folder / "earnings22/metadata.csv", METADATA + "".join(f"{id},Korea,Other\n" for id in calls))
    return folder


@pytest.fixture(scope="module")
def python() -> Iterator[Path]:
    scripts = ("evaluate", "tools.align", "finetune_ctc", "data.prepare.prepare", "data.corpora.tedlium")
    with quick_python(
        *scripts, "pandas", "torch._dynamo", "torch.utils.tensorboard", "docstring_parser", "attr"
    ) as path:
        yield path


def run_script(python: Path, *arguments: str | Path) -> str:
    """Run a command of long_context.sh; return its output."""
    done = subprocess.run(
        ["bash", "experiments/long_context.sh", *map(str, arguments)],
        cwd=REPOSITORY, env={**os.environ, "PYTHON": str(python), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def test_three_commands_make_the_table_from_the_published_layouts(corpora: Path, python: Path, tmp_path: Path) -> None:
    options = ["--folder", tmp_path, "--contexts", "128 256", "--frames", "1024", "--nproc-per-node", "1", "--tiny"]
    folders = ["--tedlium", corpora / "TEDLIUM", "--earnings22", corpora / "earnings22"]
    run_script(python, "prepare", *folders, *options)
    datasets = tmp_path / "datasets"
    sizes = {path.name: len(open_dataset(path)) for path in datasets.iterdir() if path.name != "tedlium-stm"}
    assert sizes == {"tedlium-segments": 42, "tedlium": 21, "earnings22": 12, "earnings22-full": 13}
    assert {path.stem for path in (datasets / "tedlium-stm").iterdir()} == set(published_split("tedlium")["test"])

    run_script(python, "train", *options)
    timed = open_dataset(datasets / "tedlium-timed")
    has_times = {split: all(timed.words(int(i)) for i in timed.select(split)) for split in ("train", "test")}
    assert has_times == {"train": True, "test": False}
    for context, rows in ((128, 8), (256, 4)):
        config = yaml.safe_load((tmp_path / f"models/context-{context}/config.yaml").read_text())
        assert (config["data"]["rows"], config["data"]["row_frames"]) == (rows, context)
        assert config["data"]["max_seconds"] == config["inference"]["context_seconds"] == context / 100
        assert config["finetune"]["init"] == str(tmp_path / "models/seed/export")
    assert "is finished" in run_script(python, "train", *options)

    output = run_script(python, "evaluate", *options)
    table = (tmp_path / "table.md").read_text()
    assert table in output
    columns = ["TED-LIUM test", "TED-LIUM test, by segments", "Earnings-22, 6-call test", "Earnings-22, all calls"]
    assert f"| Frames | Context | {' | '.join(columns)} |" in table
    assert re.search(r"^\| 128 \| 1.28 s (\| \d+\.\d\d% \(.*\) ){4}\|$", table, re.MULTILINE)
    assert re.search(r"^\| 256 \| 2.56 s (\| \d+\.\d\d% \(.*\) ){4}\|$", table, re.MULTILINE)
    with open(tmp_path / "table.csv") as file:
        rows = list(csv.DictReader(file))
    calls = {row["test_set"]: row["num_recordings"] for row in rows if row["scored_by"] == "recordings"}
    assert calls == {"tedlium": "11", "earnings22": "6", "earnings22-full": "13"}
    assert len(rows) == 8 and {float(row["context_seconds"]) for row in rows} == {1.28, 2.56}
    for name in ("tedlium", "earnings22", "earnings22-full"):
        assert (tmp_path / f"report/{name}/report.html").is_file()


def put_results(folder: Path, model: str, context: float, errors: int, segments: bool = False) -> None:
    """Write results of an evaluation of 100 words, with the fields that the tables use."""
    words = {"hits": 101 - errors, "substitutions": errors - 2, "deletions": 1, "insertions": 1}
    score = {"wer": errors / 100, "wer_interval": None, "words": words, "num_recordings": 1}
    results = {
        "format_version": FORMAT_VERSION, "export": f"models/{model}/export", "context_seconds": context,
        "inference": {"mode": "buffered", "overlap": 0.25}, "decoder": {"description": "greedy"},
        "decoding": {"audio_seconds_per_second": 1.0}, "scores": {"all": score}, "recordings": [],
        "segments": {"all": score} if segments else None,
    }  # fmt: skip
    put(folder / f"{model}-{context}/results.json", json.dumps(completed(results)))


def test_tables_are_in_the_order_of_contexts_with_blanks_for_missing_results(tmp_path: Path) -> None:
    for frames, errors in ((16384, 3), (2048, 4)):
        put_results(tmp_path / "results/tedlium", f"context-{frames}", frames / 100, errors, segments=True)
    for frames, errors in ((2048, 20), (512, 25)):
        put_results(tmp_path / "results/earnings22", f"context-{frames}", frames / 100, errors)
    for frames, context, errors in ((2048, 20.48, 4), (2048, 0.0, 30), (16384, 20.48, 5)):
        put_results(tmp_path / "cross/tedlium", f"context-{frames}", context, errors)
    done = subprocess.run(
        [sys.executable, "-m", "experiments.long_context_table", "--folder", tmp_path],
        cwd=REPOSITORY,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    own = """\
| Frames | Context | TED-LIUM test | TED-LIUM test, by segments | Earnings-22, 6-call test |
| --- | --- | --- | --- | --- |
| 512 | 5.12 s |  |  | 25.00% (25.0% to 25.0%) |
| 2,048 | 20.5 s | 4.00% (4.0% to 4.0%) | 4.00% (4.0% to 4.0%) | 20.00% (20.0% to 20.0%) |
| 16,384 | 2.73 min | 3.00% (3.0% to 3.0%) | 3.00% (3.0% to 3.0%) |  |
"""
    cross = """\
| Trained with | 20.5 s | whole |
| --- | --- | --- |
| 2,048 | 4.00% | 30.00% |
| 16,384 | 5.00% |  |
"""
    table = (tmp_path / "table.md").read_text()
    assert own in table and cross in table and "Decoding: buffered, overlap 0.25, greedy.\n" in table
    with open(tmp_path / "table.csv") as file:
        counts = [(row["num_errors"], row["num_words"]) for row in csv.DictReader(file)]
    assert counts == [(str(errors), "100") for errors in (4, 4, 3, 3, 25, 20, 30, 4, 5)]


# --- with stubs for the programs that the script starts

PROGRAM = """#!/usr/bin/env bash
echo "arguments: $*"
folder=$(sed -nE 's/.*--run.folder ([^ ]+).*/\\1/p' <<<"$*")
[[ "$folder" != *"${STOPPED:-none}" ]] || touch "$folder/REQUEUE"
[[ "$*" != *"${SLOW:-nothing}"* ]] || exec sleep 1000
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Folder with the shell scripts, prepared datasets, and models for two contexts."""
    for folder in ("launch", "experiments"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder)
    write_program(tmp_path / "python", PROGRAM)
    write_program(tmp_path / "bin/srun", SRUN)
    write_program(tmp_path / "bin/scontrol", SCONTROL)
    (tmp_path / "finetune_ctc.py").touch()
    for name in ("tedlium-segments", "tedlium", "tedlium-timed", "earnings22"):
        put(tmp_path / f"w/datasets/{name}/dataset.json", "")
    for context in (512, 1024):
        put(tmp_path / f"w/models/context-{context}/export/config.json", "")
    return tmp_path


def call(
    repository: Path, *arguments: str, script: str = "experiments/long_context.sh", **environment: str
) -> tuple[int, str]:
    """Exit status and output of a command of the script, with its files in the folder w."""
    path = f"{repository / 'bin'}:{os.environ['PATH']}"
    options = ["--folder", "w"] if "long_context" in script else []
    done = subprocess.run(
        ["bash", script, *arguments, *options],
        cwd=repository, env={**os.environ, "PYTHON": str(repository / "python"), "PATH": path, **environment},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout


def job() -> dict[str, str]:
    """Environment of a SLURM job."""
    names = {"JOB_ID": "123", "JOB_NODELIST": "node1", "JOB_NUM_NODES": "1", "CPUS_ON_NODE": "8", "GPUS_ON_NODE": "4"}
    return {"FAKE_STATE": "RUNNING"} | {f"SLURM_{name}": value for name, value in names.items()}


def task(number: int, count: int) -> dict[str, str]:
    """Environment of a task of a job array."""
    names = {"ID": number, "COUNT": count, "MIN": 0, "MAX": count - 1}
    return job() | {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}


def values(output: str, name: str) -> list[str]:
    return re.findall(rf"--{re.escape(name)} (\S+)", output)


def test_steps_have_the_same_frames_for_all_contexts_and_rows_fit_the_context(repository: Path) -> None:
    status, output = call(repository, "train", "--nproc-per-node", "8")
    assert status == 0, output
    trained = [int(float(seconds) * 100) for seconds in values(output, "data.max_seconds")][1:]  # the seed model first
    assert trained == [*(2**k for k in range(9, 19)), 360_000]
    rows, frames = ([int(value) for value in values(output, f"data.{name}")] for name in ("rows", "row_frames"))
    assert {r * f for r, f in zip(rows, frames, strict=True)} == {393_216}
    assert all(frames >= context for frames, context in zip(frames[1:], trained, strict=True))
    processes = [int(value) for value in values(output, "nproc-per-node")]
    processes.remove(8)  # for tools/align.py, which has no rows
    assert [r % p for r, p in zip(rows, processes, strict=True)] == [0] * 12
    assert processes == [8] * 7 + [6, 6, 3, 1, 1]
    _, output = call(repository, "train", "--nproc-per-node", "1", "--contexts", "3000")
    assert (values(output, "data.rows")[-1], values(output, "data.row_frames")[-1]) == ("128", "3072")


def test_finished_models_are_skipped_and_a_stop_ends_the_script(repository: Path) -> None:
    arguments = ["train", "--nproc-per-node", "1", "--contexts", "512 1024 2048"]
    status, output = call(repository, *arguments, STOPPED="context-1024")
    assert (
        status == 75 and f"The same command continues: bash experiments/long_context.sh {' '.join(arguments)}" in output
    )
    assert "context-2048" not in output
    status, output = call(repository, *arguments)
    started = re.findall(r"--run.folder w/models/(\S+)", output)
    assert (status, started) == (0, ["context-1024", "context-2048"])


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "expected"),
    [
        (CONTEXTS, ["train"], task(3, 11), "--run.folder w/models/context-4096"),
        (CONTEXTS, ["train", "--contexts", "512 640"], task(1, 2), "--run.folder w/models/context-640"),
        (CONTEXTS, ["evaluate"], task(1, 11), "evaluate.py --data.dataset w/datasets/tedlium "),
        (CONTEXTS, ["evaluate"], task(1, 11), "--export w/models/context-1024/export "),
        (CONTEXTS, ["evaluate", "--cross", "--contexts", "512 1024"], task(1, 3), "--grid.part 1/3"),
        (CONTEXTS, ["evaluate", "--cross", "--contexts", "512 1024"], task(1, 3), "-m tools.sweep --data.dataset"),
        (EVALUATE, ["--grid.contexts", "[5, 0]"], task(1, 2), "-m tools.sweep --grid.contexts [5, 0] --grid.part 1/2"),
        (EVALUATE, ["--export", "x", "--grid.contexts", "[5]"], job(), "-m tools.sweep --export x --grid.contexts [5]"),
        (EVALUATE, ["--config", "x.yaml"], task(0, 2), "-m tools.sweep --config x.yaml --grid.part 0/2"),
        (EVALUATE, ["--export", "x"], job(), "evaluate.py --export x\n"),
    ],
)
def test_a_task_of_a_job_array_runs_its_part(
    repository: Path, script: str, arguments: list[str], environment: dict[str, str], expected: str
) -> None:
    status, output = call(repository, *arguments, script=script, **environment)
    assert status == 0 and expected in output, output
    assert "tools.align" not in output
    assert not any(name in output for name in FINISH), "a task runs nothing that must run once"
    if "context-" in expected:
        assert set(re.findall(r"context-\d+", output)) == set(re.findall(r"context-\d+", expected))


def test_models_are_compared_with_that_of_the_shortest_context(repository: Path) -> None:
    for context in (512, 1024, 131072):
        put(repository / f"w/results/tedlium/context-{context}/results.json", "")
    (repository / "w/results/tedlium/context-2048").mkdir()  # another task is evaluating it
    (repository / "w/results/earnings22/context-512").mkdir(parents=True)
    status, output = call(repository, "table")
    folders = " ".join(f"w/results/tedlium/context-{context}" for context in (512, 1024, 131072))
    assert status == 0 and f"-m tools.compare --results {folders} --out w/report/tedlium\n" in output
    assert output.count("-m tools.compare") == 1


def test_a_stopped_job_is_requeued_and_ends(repository: Path) -> None:
    (repository / "w/datasets/tedlium-timed/dataset.json").unlink()
    status, output = call(repository, "seed", script="experiments/long_context.sbatch", STOPPED="seed", **job())
    assert status == 0 and "scontrol: requeued 123" in output and "tools.align" not in output
    assert not (repository / "w/models/seed/finished").exists()


def test_an_evaluation_is_stopped_and_requeued_before_the_time_limit(repository: Path) -> None:
    command = ["experiments/long_context.sbatch", "evaluate", "--folder", "w", "--contexts", "512 1024"]
    running = Running(repository, "bash", *command, SLOW="datasets/earnings22 ", **job())
    running.wait_for("datasets/earnings22 ")
    running.process.send_signal(signal.SIGUSR2)
    status, output = running.finish()
    assert status == 0 and output.endswith("scontrol: requeued 123\n")
    assert "w/results/earnings22/context-1024" not in output


@pytest.mark.parametrize(
    ("arguments", "slow", "expected"),
    [
        (["evaluate", "--contexts", "512 1024"], "datasets/earnings22 ", 143),
        (["train", "--contexts", "512"], "context-512 ", 75),
    ],
)
def test_killing_the_script_ends_the_programs_it_started(
    repository: Path, arguments: list[str], slow: str, expected: int
) -> None:
    # The slow program writes its process id and sleeps; a training script sleeps until a STOP file exists.
    until_stop = 'while [ ! -e "$folder/STOP" ]; do sleep 0.05; done; touch "$folder/REQUEUE"; exit'
    action = until_stop if expected == 75 else "exec sleep 1000"
    write_program(repository / "python", PROGRAM.replace("exec sleep 1000", f"{{ echo $$ >pid; {action}; }}"))
    command = ["experiments/long_context.sh", *arguments, "--folder", "w", "--nproc-per-node", "1"]
    running = Running(repository, "bash", *command, SLOW=slow)
    running.wait_for(slow)
    wait_until(lambda: (repository / "pid").exists() and (repository / "pid").read_text().strip())
    running.process.send_signal(signal.SIGTERM)
    status, output = running.finish()
    assert status == expected, output
    assert ("The same command continues" in output) == (expected == 75)
    with pytest.raises(ProcessLookupError):
        os.kill(int((repository / "pid").read_text()), 0)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ("", {}, "unknown command ''"),
        ("prepare", {}, "nothing to prepare: give --tedlium DIR"),
        ("prepare --tedlium x", {}, "--tedlium x: no test/stm"),
        ("prepare --earnings22 x", {}, "--earnings22 x: neither metadata.csv nor"),
        ("train --contexts 5,12", {}, "'5,12' is not a number"),
        ("train --nproc-per-node 1 --contexts 500000", {}, "500000 frames does not fit into a step of --frames 393216"),
        ("train --context 512", {}, "unknown argument '--context'"),
        ("evaluate --nproc-per-node 1 --contexts 2048", {}, "context-2048 has no export"),
        ("train", task(11, 12), "with 11 contexts (512 1024"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(repository: Path, arguments: str, environment: dict[str, str], message: str) -> None:
    script = CONTEXTS if environment else "experiments/long_context.sh"
    status, output = call(repository, *arguments.split(" "), script=script, **environment)
    assert status == 2 and "error: " in output and message in output, output
