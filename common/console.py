"""Standard streams in UTF-8 whatever the locale, and printing that ends nothing."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import Any


def set_up_console(may_vanish: bool = False) -> None:
    """Call it once, first of all, in a program's `__main__`.

    Where the locale is not UTF-8 (`LC_ALL=en_US.ISO-8859-1`), Python would decode arguments and file names by the
    locale, too: the interpreter is started again in its UTF-8 mode. What a stream cannot encode, such as a file name
    that is not UTF-8, is printed as `\\\\udce9`.

    may_vanish: what is printed is there for a reader only, and results lie in files. Then a console that has gone (a
    closed pipe, a terminal that was closed, a full disk) ends nothing; what is printed after it is lost.
    """
    is_utf8 = sys.flags.utf8_mode or codecs.lookup(sys.getfilesystemencoding()).name == "utf-8"
    if not is_utf8 and sys.executable and sys.argv[0] not in ("", "-"):  # a program from stdin cannot be read twice
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):  # closed by whoever started the program, or a notebook's own
            continue
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
        if may_vanish:
            setattr(sys, name, _Vanishing(stream))


class _Vanishing:
    """A text stream whose file becomes /dev/null at the first error."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.vanished = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except OSError:
            self._vanish()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._vanish()

    def _vanish(self) -> None:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)
        self.vanished = True
