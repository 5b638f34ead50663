"""Storage: correct bytes or a clear error, in bounded time and disk space."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from common.errors import UserError
from data.format.dataset import open_dataset
from data.shards.derive import stored_recording
from data.storage import block_cache
from data.storage import local as storage
from data.storage.local import Storage, StorageError, StorageSettings, TruncatedFile
from data.storage.opening import open_storage
from tests.flaky_server import FAULTS, FlakyServer
from tests.made_datasets import make_dataset
from tests.patience import PATIENCE

DATA = np.random.default_rng(0).bytes(1_000_003)
BLOCK = 2**16
FORK = multiprocessing.get_context("fork")


def quick(cache: Path, **changes: Any) -> StorageSettings:
    fields = {"cache_dir": str(cache), "block_mb": BLOCK / 2**20, "attempts": 4, "timeout_seconds": 10.0}
    return StorageSettings(**{**fields, "wait_seconds": 0.001, **changes})


def read(store: Storage, position: int, length: int, name: str = "a.bin") -> bytes:
    out = bytearray(length)
    store.read_into(name, position, memoryview(out))
    return bytes(out)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[str]:
    system = fsspec.filesystem("memory")
    system.pipe_file(f"/{tmp_path.name}/a.bin", DATA)
    yield f"memory://{tmp_path.name}"
    system.rm(f"/{tmp_path.name}", recursive=True)


@pytest.fixture
def server() -> Iterator[FlakyServer]:
    with FlakyServer({"a.bin": DATA}) as flaky:
        yield flaky


def in_child(function: Callable[[], object]) -> int:
    """Exit code of a forked process that runs the function; -N if signal N killed it."""
    child = FORK.Process(target=function)
    child.start()
    child.join(PATIENCE)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def cached_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in (cache / "blocks").iterdir())


# Every storage


@pytest.mark.parametrize("kind", ["folder", "memory", "http", "http without cache"])
def test_any_range_has_the_bytes_of_the_file(tmp_path: Path, memory: str, server: FlakyServer, kind: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.bin").write_bytes(DATA)
    location = {"folder": str(tmp_path / "folder"), "memory": memory}.get(kind, server.url)
    changes = {"cache_gb": 0} if "without" in kind else {}
    store = open_storage(location, quick(tmp_path / "cache", **changes))
    rng = random.Random(0)
    ranges = [(0, len(DATA)), (0, 1), (len(DATA) - 1, 1), (BLOCK - 1, 2), (BLOCK, BLOCK), (5, 0)]
    for _ in range(40):
        first = rng.randrange(len(DATA))
        ranges.append((first, rng.randrange(min(200_000, len(DATA) - first))))
    for first, length in ranges:
        assert read(store, first, length) == DATA[first : first + length]
    assert store.size("a.bin") == len(DATA) and store.size("b.bin") is None
    assert store.read("a.bin") == DATA == store.local_copy("a.bin").read_bytes()
    with pytest.raises(TruncatedFile, match=r"a\.bin.* before byte 1000004"):
        read(store, len(DATA) - 1, 2)
    with pytest.raises(StorageError, match=r"a\.bin has 1000003 bytes, expected at most 10"):
        store.read("a.bin", limit=10)
    for missing in (lambda: read(store, 0, 1, "b.bin"), lambda: store.read("b.bin")):
        with pytest.raises(FileNotFoundError, match=r"b\.bin"):
            missing()
    assert read(pickle.loads(pickle.dumps(store)), 7, 9) == DATA[7:16]
    assert in_child(lambda: os._exit(read(store, 99_000, 300_000) != DATA[99_000:399_000])) == 0


@pytest.mark.parametrize("name", ["../a.bin", "/etc/passwd", "x/y", "..", ".hidden", "", "a\0b", "a%2fb", "a?b", "a b"])
def test_names_cannot_refer_to_other_folders(tmp_path: Path, memory: str, name: str) -> None:
    for store in (open_storage(tmp_path), open_storage(memory, quick(tmp_path))):
        for action in (store.size, store.read, store.local_copy, lambda n, s=store: read(s, 0, 1, n)):
            with pytest.raises(UserError, match="invalid file name"):
                action(name)


@pytest.mark.parametrize(
    "location",
    ["https://u:secret@h/d", "https://h/d?sig=secret", "gs://h/secret%2f", "file:///etc/secret", "x::s3://a"],
)
def test_a_url_with_a_secret_or_of_another_kind_is_refused_and_not_repeated(tmp_path: Path, location: str) -> None:
    with pytest.raises(UserError) as error:
        open_storage(location, quick(tmp_path))
    assert "secret" not in str(error.value)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object, **__: object) -> None:
        raise ImportError("no module")

    monkeypatch.setattr(fsspec, "filesystem", without)
    with pytest.raises(UserError, match="pip install s3fs"):
        open_storage("s3://bucket/set", quick(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [("attempts", 0), ("cache_gb", -1.0), ("block_mb", 0.0), ("timeout_seconds", 0.0), ("wait_seconds", -1)],
)
def test_invalid_settings_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"storage\.{field} is {value}"):
        StorageSettings(**{field: value})


# Folders


def test_at_most_64_files_are_open_and_all_are_closed_with_the_storage(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"f{number}").write_bytes(bytes([number]))
    before = len(os.listdir("/proc/self/fd"))
    store = open_storage(tmp_path)
    for _ in range(2):
        for number in range(100):
            assert read(store, 0, 1, f"f{number}") == bytes([number])
    assert len(os.listdir("/proc/self/fd")) == before + 64
    del store
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"secret")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(OSError, match="link") as error:
        read(open_storage(tmp_path), 0, 1, "link")
    assert error.value.errno == errno.ELOOP


@pytest.mark.parametrize(("fails", "outcome"), [(3, "bytes"), (99, "error")])
def test_a_stale_file_handle_is_reopened_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int, outcome: str
) -> None:
    (tmp_path / "a.bin").write_bytes(DATA)
    store, opened, left = open_storage(tmp_path, quick(tmp_path)), [], [fails]
    real_preadv, real_open = os.preadv, os.open

    def preadv(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real_preadv(*arguments)

    def counted_open(*arguments: Any) -> int:
        opened.append(arguments[0])
        return real_open(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "open", counted_open)
    if outcome == "bytes":
        assert read(store, 10, 20) == DATA[10:30] and len(opened) == 4
    else:
        with pytest.raises(StorageError, match=r"a\.bin: failed 4 times.*Stale"):
            read(store, 10, 20)


# Web servers that fail


@pytest.mark.parametrize("fault", FAULTS)
def test_a_temporary_fault_is_retried(server: FlakyServer, tmp_path: Path, fault: str) -> None:
    store = open_storage(server.url, quick(tmp_path, timeout_seconds=2.0 if fault == "late" else 10.0))
    server.faults.extend([None, fault, fault, None])  # the first response is to HEAD
    assert read(store, 100_000, 50_000) == DATA[100_000:150_000]
    assert len(server.downloads()) >= 3
    assert read(store, 100_000, 50_000) == DATA[100_000:150_000]  # no wrong bytes were cached


@pytest.mark.parametrize("fault", FAULTS)
def test_a_permanent_fault_is_one_error_with_place_attempts_and_cause(
    server: FlakyServer, tmp_path: Path, fault: str
) -> None:
    store = open_storage(server.url, quick(tmp_path, timeout_seconds=1.0 if fault == "late" else 10.0))
    assert store.size("a.bin") == len(DATA)
    server.always = fault
    with pytest.raises(StorageError, match=rf"^{server.url}/a\.bin: failed 4 times; last error: \w+"):
        read(store, 100_000, 50_000)
    assert 4 <= len(server.downloads()) <= 8  # aiohttp repeats a request if a reused connection was closed
    assert cached_bytes(tmp_path) == 0


@pytest.mark.parametrize("fault", ["500", "drop", "late"])
def test_an_unknown_size_is_not_a_missing_file(server: FlakyServer, tmp_path: Path, fault: str) -> None:
    server.always = fault
    store = open_storage(server.url, quick(tmp_path, timeout_seconds=1.0 if fault == "late" else 10.0, attempts=2))
    with pytest.raises(StorageError, match="failed 2 times"):
        store.size("a.bin")


@pytest.mark.parametrize(("status", "error"), [("403", PermissionError), ("404", FileNotFoundError)])
def test_forbidden_and_missing_files_are_not_retried(
    server: FlakyServer, tmp_path: Path, status: str, error: type[OSError]
) -> None:
    store = open_storage(server.url, quick(tmp_path))
    assert store.size("a.bin") == len(DATA)
    server.always = status
    with pytest.raises(error, match=r"a\.bin"):
        read(store, 0, 10)
    assert len(server.downloads()) == 1
    with pytest.raises(error, match=r"a\.bin"):
        read(open_storage(server.url, quick(tmp_path)), 0, 10)


@pytest.mark.parametrize("field", ["status", "code", "status_code", "response"])
@pytest.mark.parametrize(("status", "transient"), [(503, True), (429, True), (404, False), (403, False), (410, False)])
def test_the_status_is_found_in_the_errors_of_every_back_end(field: str, status: int, transient: bool) -> None:
    error = RuntimeError("error of a back end")
    setattr(error, field, SimpleNamespace(status_code=status) if field == "response" else status)
    assert storage.is_transient(error) == transient


def test_a_server_without_ranges_is_refused_before_it_sends_the_file(server: FlakyServer, tmp_path: Path) -> None:
    store = open_storage(server.url, quick(tmp_path, attempts=1))
    assert store.size("a.bin") == len(DATA)
    server.always, server.pieces = "whole", 1000.0
    with pytest.raises(StorageError, match="must support ranges"):
        read(store, 0, 10)


def test_a_server_without_ranges_is_refused_when_a_dataset_is_opened(tmp_path: Path) -> None:
    """Whole files are correct copies of the index, so the error would otherwise come at the first crop."""
    make_dataset(tmp_path / "set", [20, 30])
    with FlakyServer({path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}) as server:
        server.always = "whole"
        with pytest.raises(UserError, match="the server must support ranges"):
            open_dataset(server.url, storage=quick(tmp_path / "cache"))


def test_a_size_larger_than_the_file_is_an_error(server: FlakyServer, tmp_path: Path) -> None:
    server.faults.append("inflated length")  # HEAD: 10 bytes more
    store = open_storage(server.url, quick(tmp_path))
    assert store.size("a.bin") == len(DATA) + 10
    assert read(store, 0, 10) == DATA[:10]
    with pytest.raises(StorageError, match="of the 16973 bytes requested"):
        read(store, len(DATA) - 5, 10)


@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    faults=st.lists(st.sampled_from([None, *(f for f in FAULTS if f != "late"), "403", "404"]), max_size=12),
    ranges=st.lists(st.tuples(st.integers(0, len(DATA)), st.integers(0, 200_000)), min_size=1, max_size=5),
    cache_blocks=st.integers(0, 6),
)
def test_faults_of_the_server_give_correct_bytes_or_an_error(
    server: FlakyServer,
    tmp_path: Path,
    faults: list[str | None],
    ranges: list[tuple[int, int]],
    cache_blocks: int,
) -> None:
    server.faults.clear()
    server.faults.extend(faults)
    store = open_storage(server.url, quick(tmp_path / "cache", attempts=3, cache_gb=cache_blocks * BLOCK / 1e9))
    for first, length in ranges:
        with contextlib.suppress(OSError):
            assert read(store, first, length) == DATA[first : first + length]
        assert cached_bytes(tmp_path / "cache") <= 6 * BLOCK


def test_waits_grow_differ_between_ranges_and_repeat_with_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waits(salt: int, seed: int = 0) -> list[float]:
        seconds: list[float] = []
        monkeypatch.setattr(time, "sleep", seconds.append)
        settings = quick(tmp_path, wait_seconds=1.0, attempts=9, seed=seed)
        with pytest.raises(StorageError):
            storage.retry(lambda: int.from_bytes(os.pread(-1, 1, 0)), "place", settings, salt)
        return seconds

    first = waits(0)
    assert all(2**n / 2 <= wait <= 2**n for n, wait in enumerate(first[:5])) and max(first) <= 30
    assert len(first) == 8 and first == waits(0) and first != waits(1) and first != waits(0, seed=1)


def test_a_programming_error_is_not_retried(tmp_path: Path) -> None:
    calls: list[int] = []

    def wrong() -> None:
        calls.append(1)
        raise TypeError("programming error")

    with pytest.raises(TypeError):
        storage.retry(wrong, "place", quick(tmp_path))
    assert len(calls) == 1


# Datasets


def test_a_dataset_on_a_flaky_server_equals_the_local_dataset(tmp_path: Path) -> None:
    local = make_dataset(tmp_path / "set", [300, 5000, 41], max_shard_bytes=500_000)
    with FlakyServer({path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}) as server:
        server.faults.extend(
            [None, "500", "drop", None, "short", None, "truncated", None, "reset", "garbage", None] * 3
        )
        remote = open_dataset(f"{server.url}/", storage=quick(tmp_path / "cache", attempts=12))
        assert remote.identity() == local.identity()
        assert [stored_recording(remote, i) for i in range(3)] == [stored_recording(local, i) for i in range(3)]
        for number, start, stop in [(0, 0, 300), (1, 4000, 4321), (1, 0, 5000), (2, 40, 41)]:
            ours, theirs = (d.read_normalised(number, start, stop, verify=True) for d in (remote, local))
            assert np.array_equal(ours, theirs)
        server.faults.clear()
        again = open_dataset(server.url, storage=quick(tmp_path / "other cache", attempts=2))
        server.always = "503"
        with pytest.raises(UserError, match=r"recording 'r001' in http.*failed 2 times"):
            again.read(1, 7, 8)


# The cache


def test_adjacent_blocks_are_fetched_in_one_request_and_only_once(server: FlakyServer, tmp_path: Path) -> None:
    store = open_storage(server.url, quick(tmp_path))
    read(store, 5 * BLOCK + 7, BLOCK)
    read(store, 2 * BLOCK, 6 * BLOCK)
    read(open_storage(server.url, quick(tmp_path)), 2 * BLOCK, 6 * BLOCK)
    ranges = [request[2] for request in server.downloads()]
    assert ranges == [f"bytes={first * BLOCK}-{stop * BLOCK - 1}" for first, stop in [(5, 7), (2, 5), (7, 8)]]


def test_without_a_cache_exactly_the_requested_bytes_are_fetched_and_not_kept(
    server: FlakyServer, tmp_path: Path
) -> None:
    store = open_storage(server.url, quick(tmp_path, cache_gb=0))
    for _ in range(2):
        assert read(store, 70_000, 90_000) == DATA[70_000:160_000]
    assert [request[2] for request in server.downloads()] == ["bytes=70000-159999"] * 2
    assert cached_bytes(tmp_path) == 0


def test_the_cache_is_bounded_and_evicts_the_least_recently_read_blocks(memory: str, tmp_path: Path) -> None:
    store = open_storage(memory, quick(tmp_path, cache_gb=8 * BLOCK / 1e9))
    for number in range(8):
        read(store, number * BLOCK, BLOCK)
    for age, number in enumerate([5, 2, 7, 1, 0, 3, 6, 4]):  # least recently read first
        (path,) = (tmp_path / "blocks").glob(f"*-{number:08d}")
        os.utime(path, (0, 1_000_000 + age))
    read(store, 5 * BLOCK, 1)
    for number in range(8, 15):
        read(store, number * BLOCK, BLOCK)
        assert cached_bytes(tmp_path) <= 8 * BLOCK
        if number == 9:
            remaining = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "blocks").iterdir())
            assert remaining == [0, 1, 3, 4, 5, 6, 8, 9]


def test_a_block_larger_than_the_cache_is_still_read(memory: str, tmp_path: Path) -> None:
    store = open_storage(memory, quick(tmp_path, cache_gb=(BLOCK - 1) / 1e9))
    assert read(store, 0, 2 * BLOCK) == DATA[: 2 * BLOCK] and cached_bytes(tmp_path) == 0


def read_many(location: str, cache: Path, seed: int) -> None:
    store, rng = open_storage(location, quick(cache, cache_gb=5 * BLOCK / 1e9)), random.Random(seed)
    for _ in range(60):
        first, length = rng.randrange(len(DATA) - 100_000), rng.randrange(100_000)
        assert read(store, first, length) == DATA[first : first + length]
        assert cached_bytes_now(cache) <= 5 * BLOCK


def cached_bytes_now(cache: Path) -> int:
    """Like cached_bytes, while other processes change the folder."""
    total = 0
    for path in (cache / "blocks").iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_processes_share_a_small_cache_and_read_correctly(memory: str, tmp_path: Path) -> None:
    children = [FORK.Process(target=read_many, args=(memory, tmp_path, seed)) for seed in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(PATIENCE)
    assert [child.exitcode for child in children] == [0, 0, 0]


def test_blocks_fetched_by_one_process_are_cached_for_others(server: FlakyServer, tmp_path: Path) -> None:
    settings = quick(tmp_path)
    assert in_child(lambda: read(open_storage(server.url, settings), 0, 500_000) and None) == 0
    fetched = len(server.downloads())
    assert read(open_storage(server.url, settings), 0, 500_000) == DATA[:500_000]
    assert len(server.downloads()) == fetched


@pytest.mark.parametrize("step", ["open", "pwrite", "rename"])
def test_a_process_killed_while_caching_a_block_leaves_a_working_cache(memory: str, tmp_path: Path, step: str) -> None:
    settings = quick(tmp_path, cache_gb=3 * BLOCK / 1e9)
    read(open_storage(memory, settings), 0, 1)

    def killed() -> None:
        real = getattr(os, step)

        def kill(*arguments: Any, **others: Any) -> Any:
            if step != "open" or "block.tmp" in str(arguments[0]):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **others)

        setattr(os, step, kill)
        read(open_storage(memory, settings), 100_000, 300_000)

    assert in_child(killed) == -signal.SIGKILL
    store = open_storage(memory, settings)
    for first in (0, 100_000, 500_000, 100_000, 900_000):
        assert read(store, first, 100_000) == DATA[first : first + 100_000]
        assert cached_bytes(tmp_path) <= 3 * BLOCK
    assert sorted(path.name for path in tmp_path.iterdir()) in (
        ["blocks", "blocks.lock", "copies"],
        ["block.tmp", "blocks", "blocks.lock", "copies"],
    )


def test_a_whole_file_is_fetched_once_per_node(server: FlakyServer, tmp_path: Path) -> None:
    def copy() -> None:
        assert open_storage(server.url, quick(tmp_path)).local_copy("a.bin").read_bytes() == DATA

    children = [FORK.Process(target=copy) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(PATIENCE)
    assert [child.exitcode for child in children] == [0, 0, 0]
    requested = [bytes_ for _, _, bytes_ in server.downloads()]
    assert requested == ["bytes=0-0", f"bytes=1-{len(DATA) - 1}"]


def test_a_killed_download_leaves_no_copy_and_the_next_one_is_complete(
    server: FlakyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.storage.remote._MAX_REQUEST", 2**18)
    server.pieces = 0.02
    child = FORK.Process(target=lambda: open_storage(server.url, quick(tmp_path)).local_copy("a.bin"))
    child.start()
    while child.is_alive() and len(server.downloads()) < 3:
        time.sleep(0.005)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join(PATIENCE)
    assert child.exitcode == -signal.SIGKILL
    assert list((tmp_path / "copies").glob("*a.bin")) == []
    path = open_storage(server.url, quick(tmp_path)).local_copy("a.bin")
    assert path.read_bytes() == DATA and list((tmp_path / "copies").glob("*.tmp")) == []


def test_a_replaced_file_is_fetched_again_and_its_old_copy_removed(memory: str, tmp_path: Path) -> None:
    old = open_storage(memory, quick(tmp_path)).local_copy("a.bin")
    read(open_storage(memory, quick(tmp_path)), 0, 10)
    fsspec.filesystem("memory").pipe_file(f"/{memory[9:]}/a.bin", DATA[::-1])
    store = open_storage(memory, quick(tmp_path))
    assert read(store, 0, 10) == DATA[::-1][:10]
    assert store.local_copy("a.bin").read_bytes() == DATA[::-1] and not old.exists()


def test_leftovers_of_killed_processes_are_overwritten(memory: str, tmp_path: Path) -> None:
    open_storage(memory, quick(tmp_path)).local_copy("a.bin")
    (lock,) = (tmp_path / "copies").glob("*.lock")
    for leftover in (tmp_path / "block.tmp", lock.with_suffix(".tmp")):
        leftover.write_bytes(bytes(2 * len(DATA)))
    fsspec.filesystem("memory").pipe_file(f"/{memory[9:]}/a.bin", DATA[:100_000])
    store = open_storage(memory, quick(tmp_path))
    assert store.local_copy("a.bin").read_bytes() == DATA[:100_000]
    assert read(store, 0, 100_000) == DATA[:100_000]
    assert cached_bytes(tmp_path) == 100_000


def test_truncated_and_forgotten_blocks_are_fetched_again(server: FlakyServer, tmp_path: Path) -> None:
    store = open_storage(server.url, quick(tmp_path))
    read(store, 0, 3 * BLOCK)
    first, second, third = sorted((tmp_path / "blocks").iterdir())
    first.write_bytes(DATA[:100])
    second.write_bytes(bytes(BLOCK))
    third.write_bytes(DATA)  # too long
    store.forget("a.bin", BLOCK + 5, 10)
    assert read(store, 0, 3 * BLOCK) == DATA[: 3 * BLOCK]


def test_a_full_disk_of_the_cache_is_a_warning_and_reading_continues(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(block_cache, "_write", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        assert read(open_storage(memory, quick(tmp_path)), 0, 100_000) == DATA[:100_000]


def test_a_cache_folder_of_another_user_is_refused(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UserError, match=r"storage\.cache_dir.*another user"):
        open_storage(memory, quick(tmp_path))


def test_threads_may_read_concurrently(server: FlakyServer, tmp_path: Path) -> None:
    store, wrong = open_storage(server.url, quick(tmp_path)), []

    def several(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(10):
            first = rng.randrange(len(DATA) - 100_000)
            if read(store, first, 100_000) != DATA[first : first + 100_000]:
                wrong.append(first)

    threads = [threading.Thread(target=several, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert wrong == [] and not any(thread.is_alive() for thread in threads)
