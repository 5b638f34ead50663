"""A repeatedly killed preparation gives the same dataset as an uninterrupted one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.format.dataset import open_dataset
from data.prepare.prepare import main
from data.shards.derive import stored_recording
from tests.paths import REPOSITORY
from tests.patience import PATIENCE

# Forks a preparation of every unfinished part, kills each at a random time, and repeats until all are done; then
# continues with the next folder until there were enough kills. A fork takes a millisecond, a new interpreter seconds.
DRIVER = """
import contextlib, dataclasses, os, random, signal, sys, time
import torch
with contextlib.suppress(ImportError):
    import pandas  # pyarrow does so late, and slowly
from data.corpora.registry import find_corpus
from data.prepare.prepare import prepare
from data.prepare.prepare import parse

folder, parts, kills, seed = sys.argv[1], *map(int, sys.argv[2:5])
corpus, features, settings = parse("folder", find_corpus("folder"), [*sys.argv[5:], "--out", "x"])
draw = random.Random(seed)

def started(out, part="0/1"):
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            prepare("folder", corpus, features, dataclasses.replace(settings, out=f"{folder}/{out}", part=part))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid

# Nothing is prepared in this process: a fork of a process with threads may deadlock.
torch.set_num_threads(1)
begin = time.monotonic()
assert os.waitpid(started("undisturbed"), 0)[1] == 0
whole = time.monotonic() - begin
killed = number = 0
while killed < kills:
    left, within = list(range(parts)), whole
    while left:
        running = {}
        within *= 1.1  # so that it ends on a machine that has become busy
        for part in left:
            pid = started(number, f"{part}/{parts}")
            # Early times are more probable: a continued run is shorter, and start and end are the critical parts.
            running[pid] = part, time.monotonic() + within * draw.random() ** 2
        while running:
            for pid, (part, when) in list(running.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if not ended and time.monotonic() >= when:
                    os.kill(pid, signal.SIGKILL)
                    ended, status = os.waitpid(pid, 0)
                if ended:
                    del running[pid]
                    if os.WIFSIGNALED(status):
                        killed += 1
                    else:
                        assert os.WEXITSTATUS(status) == 0, status
                        left.remove(part)
            time.sleep(0.0005)
    number += 1
print("killed", killed, number)
"""


def write_audio(folder: Path, count: int) -> list[str]:
    """Write short recordings and two unreadable ones. Returns the arguments that prepare them, one shard each."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        soundfile.write(folder / f"{number:02}.wav", generator.uniform(-0.5, 0.5, 3200), 16000)
    (folder / "01.wav").write_bytes(b"")
    (folder / f"{count - 2:02}.wav").write_bytes(b"no sound")
    text = ["--text", "none", "--max_skipped_share", "0.9", "--shard_minutes", "1e-9"]
    return ["folder", "--folder", str(folder), *text]


def assert_same(out: Path, undisturbed: Path) -> None:
    """Same index, same values, same list of skipped recordings; nothing else left in the folder."""
    ours, theirs = open_dataset(out), open_dataset(undisturbed)
    assert ours.fingerprint == theirs.fingerprint and len(ours) == len(theirs)
    for i in range(len(ours)):
        assert stored_recording(ours, i) == stored_recording(theirs, i)
        assert np.array_equal(ours.read(i, verify=True), theirs.read(i, verify=True))
    assert (out / "skipped.jsonl").read_bytes() == (undisturbed / "skipped.jsonl").read_bytes()
    facts = [json.loads((folder / "dataset.json").read_bytes()) for folder in (out, undisturbed)]
    assert all(facts[0][name] == facts[1][name] for name in ("recordings", "frames", "mean", "std", "fingerprint"))
    shards = len(list(out.glob("shard-*.safetensors")))
    assert shards == facts[0]["shards"]
    others = {path.name for path in undisturbed.iterdir() if not path.name.startswith("shard-")}
    assert {path.name for path in out.iterdir() if not path.name.startswith("shard-")} == others


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """Folder in memory if available: a kill has the same effect there, and syncing is free."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.mark.parametrize("parts", [1, 3])
def test_fifty_kills_at_random_points_do_not_change_the_dataset(parts: int, memory_folder: Path) -> None:
    folder, kills = memory_folder, 50
    arguments = [*write_audio(folder / "audio", 12)[1:], "--workers", "1", "--shard_mb", "1"]
    program = [sys.executable, "-c", DRIVER, str(folder), str(parts), str(kills), "0", *arguments]
    ended = subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    print(ended.stdout[-20:])
    killed, datasets = map(int, ended.stdout.split("killed ")[1].split())
    assert killed >= kills
    for number in range(datasets):
        assert_same(folder / str(number), folder / "undisturbed")


def test_after_a_kill_with_workers_no_finished_work_is_repeated(tmp_path: Path) -> None:
    arguments = [*write_audio(tmp_path / "audio", 40), "--workers", "2", "--out"]
    out, kept = tmp_path / "out", dict[Path, int]()
    for enough in (5, 15):
        program = [sys.executable, "-m", "data.prepare", *arguments, str(out)]
        process = subprocess.Popen(program, cwd=REPOSITORY, start_new_session=True)
        # The last shard may not have its row in the index yet: it is then written again.
        while len(finished := sorted(out.glob("shard-*.safetensors"))) <= enough and process.poll() is None:
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
        kept = {path: path.stat().st_mtime_ns for path in finished[:enough]}
    assert main([*arguments, str(out)]) == 0
    assert len(kept) == 15 and all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert main([*arguments[:-2], "1", "--out", str(tmp_path / "undisturbed")]) == 0
    assert_same(out, tmp_path / "undisturbed")


def test_a_preparation_stopped_by_sigterm_keeps_finished_work(tmp_path: Path) -> None:
    arguments = [*write_audio(tmp_path / "audio", 40)[:-2], "--workers", "1", "--out"]
    # Slow disk: every recording takes 50 ms, so that the signal arrives in the middle of a shard.
    program = (
        "import sys, time, data.format.writer as w, data.prepare.prepare as p\n"
        "add = w.DatasetWriter.add\n"
        "def slowly(self, *a):\n    add(self, *a)\n    time.sleep(0.05)\n    len(self.done_ids) % 8 or self.close()\n"
        "w.DatasetWriter.add = slowly\n"
        "sys.exit(p.main(sys.argv[1:]))"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", program, *arguments, str(out)], cwd=REPOSITORY)
    while not (out / "shard-00001.safetensors.tmp").exists():
        assert process.poll() is None, "it must still be running"
        time.sleep(0.01)
    time.sleep(0.15)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130
    assert not (out / "dataset.json").exists() and not list(out.glob("*.tmp"))
    kept = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.safetensors")}
    assert len(kept) == 2  # the open shard was finished
    assert main([*arguments, str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert main([*arguments, str(tmp_path / "undisturbed")]) == 0
    assert_same(out, tmp_path / "undisturbed")


def test_ctrl_c_while_workers_start_prints_one_line(tmp_path: Path) -> None:
    """A terminal sends the signal to every process of the group, including those that are still importing."""
    arguments = [*write_audio(tmp_path / "audio", 8)[:-2], "--workers", "2", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "data.prepare", *arguments]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.exists() or not any(_is_server(pid) for pid in children.read_text().split()):
        assert process.poll() is None, "it must still be running"
        time.sleep(0.01)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert errors.strip().splitlines() == ["interrupted: finished work is kept, the same command continues"]
    assert main(arguments) == 0


def _is_server(pid: str) -> bool:
    with contextlib.suppress(OSError):
        return b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False
