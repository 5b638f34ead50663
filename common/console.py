"""Set-up of stdout and stderr: UTF-8 regardless of the locale, and optionally no error if the console is closed."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import Any


def set_up_console(may_vanish: bool = False) -> None:
    """Set stdout and stderr to UTF-8. Call this once, first of all, in a program's `__main__`.

    With a locale that is not UTF-8 (`LC_ALL=en_US.ISO-8859-1`), Python also decodes arguments and file names by the
    locale, so the interpreter is restarted in its UTF-8 mode. Lone surrogates, as in a file name that is not UTF-8, are
    printed as `\\udce9`.

    Args:
        may_vanish: output is informative only, as results go to files. A closed console (pipe, terminal, full disk)
            then does not end the program; later output is discarded.
    """
    is_utf8 = sys.flags.utf8_mode or codecs.lookup(sys.getfilesystemencoding()).name == "utf-8"
    if not is_utf8 and sys.executable and sys.argv[0] not in ("", "-"):  # a program on stdin cannot be read again
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):  # closed by the parent process, or the stream of a notebook
            continue
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
        if may_vanish:
            setattr(sys, name, _DiscardAfterError(stream))


class _DiscardAfterError:
    """Text stream that is redirected to /dev/null at the first write error."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except OSError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._discard()

    def _discard(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
