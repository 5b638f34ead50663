"""Ports for the servers of tests."""

import itertools
import os
import socket
from contextlib import suppress

_numbers = itertools.count()


def free_port() -> int:
    """Return a port of this machine that stays free until the server of the test uses it.

    The ephemeral ports (32768 and above) are avoided, since the system may assign them to another process. Each test
    process uses its own range of fifty ports, selected by its process id.
    """
    while True:
        port = 10_000 + os.getpid() % 180 * 50 + next(_numbers) % 50
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
