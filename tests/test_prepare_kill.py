"""A preparation that is killed, anywhere and often, ends as the dataset of an undisturbed one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.prepare import main
from data.shards import open_dataset

REPOSITORY = Path(__file__).resolve().parent.parent
# Forks a preparation of every part that is not done, kills each at a moment of its own, and again, until all are done;
# then the next folder, until there were enough kills. A fork costs a millisecond where a new interpreter costs seconds.
DRIVER = """
import contextlib, os, random, signal, sys, time
import torch
from data.prepare import main

def started(arguments):
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(arguments))
    return pid

folder, parts, kills, seed = sys.argv[1], *map(int, sys.argv[2:5])
arguments, draw = [*sys.argv[5:], "--out"], random.Random(seed)
torch.set_num_threads(1)
begin = time.monotonic()
assert os.waitpid(started([*arguments, f"{folder}/undisturbed"]), 0)[1] == 0
whole = time.monotonic() - begin
killed = number = 0
while killed < kills:
    left = list(range(parts))
    while left:
        running = {}
        for part in left:
            pid = started([*arguments, f"{folder}/{number}", f"--part={part}/{parts}"])
            # Early moments are likelier: a run that continues is shorter, and beginning and ending are the hard parts.
            running[pid] = part, time.monotonic() + whole * draw.random() ** 2
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
print(killed, number)
"""


def write_audio(folder: Path, count: int) -> list[str]:
    """Short recordings and two that cannot be read; the arguments that prepare them, a shard each."""
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
        assert ours.recording(i) == theirs.recording(i)
        assert np.array_equal(ours.read(i, verify=True), theirs.read(i, verify=True))
    assert (out / "skipped.jsonl").read_bytes() == (undisturbed / "skipped.jsonl").read_bytes()
    facts = [json.loads((folder / "dataset.json").read_bytes()) for folder in (out, undisturbed)]
    assert all(facts[0][name] == facts[1][name] for name in ("recordings", "frames", "mean", "std", "fingerprint"))
    shards = len(list(out.glob("shard-*.safetensors")))
    assert shards == facts[0]["shards"]
    others = {path.name for path in undisturbed.iterdir() if not path.name.startswith("shard-")}
    assert {path.name for path in out.iterdir() if not path.name.startswith("shard-")} == others


@pytest.mark.parametrize(("parts", "kills"), [(1, 50), (3, 50)])
def test_fifty_kills_at_random_points_change_nothing(parts: int, kills: int, tmp_path: Path) -> None:
    arguments = [*write_audio(tmp_path / "audio", 12), "--workers", "1"]
    program = [sys.executable, "-c", DRIVER, str(tmp_path), str(parts), str(kills), "0", *arguments]
    ended = subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    killed, datasets = map(int, ended.stdout.split())
    assert killed >= kills
    for number in range(datasets):
        assert_same(tmp_path / str(number), tmp_path / "undisturbed")


def test_a_killed_process_group_with_workers_continues_without_doing_anything_again(tmp_path: Path) -> None:
    arguments = [*write_audio(tmp_path / "audio", 40), "--workers", "2", "--out"]
    out, kept = tmp_path / "out", dict[Path, int]()
    for enough in (5, 15):
        program = [sys.executable, "-m", "data.prepare", *arguments, str(out)]
        process = subprocess.Popen(program, cwd=REPOSITORY, start_new_session=True)
        # The last shard may lack its row in the index yet: it is the one that is written again.
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


def test_a_preparation_that_is_asked_to_end_keeps_what_it_has(tmp_path: Path) -> None:
    arguments = [*write_audio(tmp_path / "audio", 40)[:-2], "--workers", "1", "--out"]
    # A slow disk: every recording takes 50 ms, so that the signal falls in the middle of a shard.
    program = (
        "import sys, time, data.writer as w, data.prepare as p\n"
        "add = w.DatasetWriter.add\n"
        "def slowly(self, *a):\n    add(self, *a)\n    time.sleep(0.05)\n    len(self.done_ids) % 8 or self.close()\n"
        "w.DatasetWriter.add = slowly\n"
        "sys.exit(p.main(sys.argv[1:]))"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", program, *arguments, str(out)], cwd=REPOSITORY)
    while not (out / "shard-00001.safetensors.tmp").exists():
        assert process.poll() is None, "it must still be at work"
        time.sleep(0.01)
    time.sleep(0.15)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130
    assert not (out / "dataset.json").exists() and not list(out.glob("*.tmp"))
    kept = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.safetensors")}
    assert len(kept) == 2  # the one that was open is closed
    assert main([*arguments, str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert main([*arguments, str(tmp_path / "undisturbed")]) == 0
    assert_same(out, tmp_path / "undisturbed")
