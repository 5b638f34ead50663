"""Replacement for `python` with a short start-up time, for tests of shell scripts that start it many times.

A small program spends most of its time importing torch. A server process imports torch once, and forks for every
program, with the arguments, folder, environment and standard streams of that program. `torch.distributed.run` with one
process is replaced by the program that it would start.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    program = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(connection, [len(program).to_bytes(8)], [0, 1, 2])
    connection.sendall(program)
    status = connection.recv(1)
sys.exit(status[0] if status else 1)
"""


@contextmanager
def quick_python(*modules: str) -> Iterator[Path]:
    """Yield the path of an executable that replaces python, with these modules imported in advance."""
    with tempfile.TemporaryDirectory() as folder:  # a short path: the address of a socket has at most 107 characters
        address, client = f"{folder}/socket", Path(folder, "python")
        client.write_text(CLIENT.format(python=sys.executable, address=address))
        client.chmod(0o755)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()
            command = [sys.executable, __file__, str(listener.fileno()), *modules]
            server = subprocess.Popen(command, cwd=REPOSITORY, pass_fds=[listener.fileno()])
            try:
                yield client
            finally:
                server.terminate()
                server.wait()


def serve(listener: socket.socket) -> None:
    """Run programs one after another, each in a fork of this process."""
    while True:
        connection, _ = listener.accept()
        with connection:
            size, files, _, _ = socket.recv_fds(connection, 8, 3)
            program = b""
            while len(program) < int.from_bytes(size):
                program += connection.recv(1 << 16)
            child = os.fork()
            if child == 0:
                os._exit(run(files, *json.loads(program)))
            for file in files:
                os.close(file)
            connection.sendall(bytes([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256]))


def run(files: Sequence[int], arguments: list[str], folder: str, environment: dict[str, str]) -> int:
    """Imitate python with these arguments, as far as the tests use it; return the exit status."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    # The streams of the server still refer to its original files.
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    warnings.filterwarnings("ignore", ".* found in sys.modules after import of package", RuntimeWarning)
    status = 0
    try:
        if arguments[:2] == ["-m", "torch.distributed.run"]:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "--max-restarts", "0"]
            assert arguments[: len(launcher)] == launcher, arguments
            arguments = arguments[len(launcher) :]
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001 - as python does; and the fork must not continue as a server
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)
    for module in sys.argv[2:]:
        __import__(module)
    serve(socket.socket(fileno=int(sys.argv[1])))
