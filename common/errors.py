"""Error for a user's mistake, warning about suspect audio, and suggestions for misspelled names."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Invalid input or settings. The message names the field or file, the value, and the fix."""


class AudioWarning(UserWarning):
    """Suspect audio that can be read. The message names the file and the fix."""


def nearest_name(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Most similar known name, or None if no similarity (`difflib`) reaches `cutoff`."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggestion " Did you mean 'X'?" of the nearest known name, or "" if none is near."""
    near = nearest_name(name, known)
    return f" Did you mean {near!r}?" if near else ""
