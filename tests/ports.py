"""Ports for servers that a test starts."""

import itertools
import os
import socket
from contextlib import suppress

_numbers = itertools.count()


def free_port() -> int:
    """A port of this machine that stays free until the test's server takes it.

    Not one that the system chooses (32768 and above): it may give the same one to another process a moment later. And
    none of another test process's: each has fifty of its own, by its process id.
    """
    while True:
        port = 10_000 + os.getpid() % 180 * 50 + next(_numbers) % 50
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
