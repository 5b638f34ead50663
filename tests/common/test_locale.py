"""UTF-8 text and a closed console, for every locale and file name."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from common.files import write_file
from data.features import FeatureSettings
from data.format.dataset import open_dataset
from data.format.writer import DatasetWriter
from data.recording import Recording
from data.tokenizer import load_tokenizer
from tests.paths import REPOSITORY
from tests.scripts.test_evaluate import make_export
from tests.tiny import ENCODER, RUN

JAPANESE = "\u65e5\u672c\u8a9e"
TEXT = f"\u0159e\u010d na\u00efve {JAPANESE}"
# Without Python's UTF-8 mode, as with LC_ALL=en_US.ISO-8859-1: files, names and streams are ASCII.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(scope="module")
def latin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment with a locale in ISO-8859-1, generated here."""
    folder = tmp_path_factory.mktemp("locales")
    command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / "en_US.ISO-8859-1")]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"localedef cannot make the locale: {error}")
    return {"LOCPATH": str(folder), "LC_ALL": "en_US.ISO-8859-1"}


@pytest.fixture
def locale(request: pytest.FixtureRequest) -> dict[str, str]:
    environment: dict[str, str] = ASCII if request.param == "ascii" else request.getfixturevalue("latin")
    return environment


def start(locale: dict[str, str], *command: str, **more: object) -> subprocess.CompletedProcess[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "PYTHON", "LANG"))}
    done: subprocess.CompletedProcess[bytes] = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, env=environment | locale | {"OMP_NUM_THREADS": "1"},
        capture_output=True, check=False, **more,  # type: ignore[call-overload]
    )  # fmt: skip
    return done


def make_dataset(path: Path) -> Path:
    generator = np.random.default_rng(0)
    with DatasetWriter(path, FeatureSettings()) as writer:
        for number in range(8):
            split = "dev" if number > 5 else "train"
            recording = Recording(f"{JAPANESE}-{number}", TEXT, language="ja", split=split)
            writer.add(recording, generator.normal(size=(150, 80)).astype(np.float32))
        writer.finish()
    return path


@pytest.mark.parametrize(
    ("script", "locale"), [("finetune_ctc.py", "ascii"), ("finetune_rnnt.py", "latin")], indirect=["locale"]
)
def test_fine_tuning_prints_a_hypothesis_and_saves(script: str, tmp_path: Path, locale: dict[str, str]) -> None:
    dataset = make_dataset(tmp_path / JAPANESE)
    small = ["--transducer.prediction_dim=8", "--transducer.joint_dim=8"] if script == "finetune_rnnt.py" else []
    small += ["--data.rows=2", "--data.row_frames=400", "--data.num_workers=1", "--data.start_method=spawn"]
    run = [f"--run.folder={tmp_path / TEXT}", "--run.steps=2", "--validation.every_steps=1"]
    done = start(locale, script, *ENCODER, *RUN, *small, *run, f"--data.dataset={dataset}")
    assert (done.returncode, done.stderr.decode()) == (0, "")
    out = done.stdout.decode()
    said = [line for line in out.splitlines() if line.startswith("    reference:")]
    assert len(said) == 2 and JAPANESE[0] in said[0] and f"h of labelled audio in {dataset}" in out
    assert set(JAPANESE) <= set(load_tokenizer(tmp_path / TEXT / "export").pieces)
    assert f"dataset: {dataset}" in (tmp_path / TEXT / "config.yaml").read_text(encoding="utf-8")
    assert f"`{dataset}`" in (tmp_path / TEXT / "export/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("locale", ["ascii"], indirect=True)
def test_transcribe_and_evaluate_name_files_and_print_in_utf8(tmp_path: Path, locale: dict[str, str]) -> None:
    (tmp_path / "run").mkdir()
    export = make_export(tmp_path / "run/export", FeatureSettings())
    talks = tmp_path / "talks" / TEXT
    talks.mkdir(parents=True)
    soundfile.write(str(talks / f"{JAPANESE}.wav"), np.random.default_rng(0).normal(size=16000) / 9, 16000)
    recipe = tmp_path / "recipe.yaml"  # names in a file are UTF-8, too
    recipe.write_text(f"export: {export}\naudio: {talks}\ndevice: cpu\n", encoding="utf-8")
    command = ["transcribe.py", "--config", str(recipe)]
    done = start(locale, *command, "--workers=2", f"--out={tmp_path / 'out'}")
    assert (done.returncode, done.stderr.decode()) == (0, "")
    assert (tmp_path / "out" / f"{JAPANESE}.txt").is_file()
    assert start(locale, *command).stdout.decode().startswith(f"{talks}/{JAPANESE}.wav\t")
    dataset = make_dataset(tmp_path / "data")
    command = ["evaluate.py", f"--export={export}", f"--data.dataset={dataset}", "--data.split=dev", "--device=cpu"]
    done = start(locale, *command, f"--out={tmp_path / TEXT}", "--formats=txt", "--resamples=100")
    assert (done.returncode, done.stderr.decode()) == (0, "")
    names = sorted(path.name for path in (tmp_path / TEXT / "transcripts").iterdir())
    assert names == [f"{JAPANESE}-6.txt", f"{JAPANESE}-7.txt"]


@pytest.mark.parametrize("locale", ["latin"], indirect=True)
def test_data_are_prepared_and_shown_in_utf8(tmp_path: Path, locale: dict[str, str]) -> None:
    talks, out = tmp_path / "talks", tmp_path / JAPANESE
    talks.mkdir()
    for name in (TEXT, "plain"):
        soundfile.write(str(talks / f"{name}.wav"), np.random.default_rng(0).normal(size=16000) / 9, 16000)
        (talks / f"{name}.txt").write_text(TEXT, encoding="utf-8")
    done = start(locale, "-m", "data.prepare", "folder", f"--folder={talks}", f"--out={out}", "--workers=2")
    assert done.returncode == 0, done.stderr.decode()
    assert f"finished {out}" in done.stdout.decode()
    dataset = open_dataset(out)
    assert [dataset.id(i) for i in range(2)] == sorted([TEXT, "plain"]) and dataset.text(0) == TEXT
    shown = start(locale, "-m", "data.shards", "inspect", str(out), "--id", TEXT)
    assert shown.returncode == 0 and TEXT in shown.stdout.decode()


PRINTS = """
import sys
from common.console import set_up_console
if __name__ == "__main__":
    set_up_console(may_vanish={may_vanish})
    print("{text}\\udce9 \u00e9", flush=True)
    for number in range(3):
        print(number, "x" * 200_000, flush=True)  # more than a pipe holds: waits until it is read or closed
        print("to stderr", file=sys.stderr, flush=True)
    open(sys.argv[1], "x").close()
"""


@pytest.mark.parametrize("may_vanish", [True, False])
def test_a_closed_console_ends_only_programs_whose_output_is_their_result(may_vanish: bool, tmp_path: Path) -> None:
    """A run continues after its pipe is closed; a program whose output is its result fails."""
    script, mark = tmp_path / "script.py", tmp_path / "done"
    script.write_text(PRINTS.format(may_vanish=may_vanish, text="A"), encoding="utf-8")
    environment = os.environ | ASCII | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        [sys.executable, str(script), str(mark)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().decode() == "A\\udce9 \u00e9\n"
        process.stdout.close()
        error = process.stderr.read().decode()
    assert (process.returncode == 0, mark.exists()) == (may_vanish, may_vanish)
    assert ("BrokenPipeError" in error) != may_vanish
    mark.unlink(missing_ok=True)
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, str(script), str(mark)], stdout=full, env=environment, check=False)
    assert (done.returncode == 0, mark.exists()) == (may_vanish, may_vanish)


def test_streams_that_are_no_files_stay_as_they_are(tmp_path: Path) -> None:
    """Streams of a notebook's `%run`, or of a program that captures the output of another one."""
    script = tmp_path / "script.py"
    script.write_text("from common.console import set_up_console\nset_up_console(may_vanish=True)\nprint('printed')\n")
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(None):
        runpy.run_path(str(script), run_name="__main__")
    assert out.getvalue() == "printed\n"


def test_what_is_not_unicode_is_written_as_json_writes_it(tmp_path: Path) -> None:
    write_file(tmp_path / "x.json", json.dumps({"path": os.fsdecode(b"caf\xe9")}, ensure_ascii=False))
    assert (tmp_path / "x.json").read_bytes() == b'{"path": "caf\\udce9"}'
    assert json.loads((tmp_path / "x.json").read_bytes()) == {"path": "caf\udce9"}
