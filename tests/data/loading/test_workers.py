"""Workers of the loader: killed ones are replaced, and a hung one does not hold up a request to stop."""

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator

import pytest

from data.loading import workers
from data.loading.workers import MAX_RESTARTS, read_in_workers

PLANS = 30


class Reader:
    """Twice the plan; `killed` plans kill the worker at their first reading, `hung` ones stop it."""

    def __init__(self, killed: int = -1, hung: int = -1, always: bool = False) -> None:
        self.killed, self.hung, self.always = killed, hung, always
        self.first = multiprocessing.get_context("fork").Value("b", 1)

    def __getitem__(self, plan: int) -> int:
        if plan == self.killed and (self.always or self.first.value):
            self.first.value = 0
            os.kill(os.getpid(), signal.SIGKILL)
        if plan == self.hung:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.001 * (plan % 3))
        return 2 * plan


def read(reader: Reader, interrupted: list[bool] | None = None) -> Iterator[int]:
    answers = iter(interrupted or [])
    return read_in_workers(
        reader, range(PLANS), num_workers=2, prefetch=3, start_method="fork", interrupted=lambda: next(answers)
    )


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "POLL", 0.2)


def test_a_killed_worker_changes_no_batch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert list(read(Reader(killed=13), [False] * 99)) == [2 * plan for plan in range(PLANS)]
    assert "started again" in caplog.text


def test_workers_that_die_again_and_again_are_an_error(caplog: pytest.LogCaptureFixture) -> None:
    batches = []
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="exited unexpectedly"):
        for batch in read(Reader(killed=13, always=True), [False] * 99):
            batches.append(batch)
    assert len(batches) <= 13 and batches == [2 * plan for plan in range(len(batches))]
    assert caplog.text.count("started again") >= MAX_RESTARTS


def test_a_request_to_stop_ends_the_wait_for_a_hung_worker_and_kills_it() -> None:
    before = set(multiprocessing.active_children())
    batches = list(read(Reader(hung=7), [False, False, True]))
    assert len(batches) <= 7 and batches == [2 * plan for plan in range(len(batches))]
    for child in set(multiprocessing.active_children()) - before:
        child.join(60)
        assert not child.is_alive()
