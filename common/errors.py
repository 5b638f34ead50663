"""The error for a user's mistake, the warning about suspect audio, and suggestions for misspelled names."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input or settings. The message names the field or file, the value, and the fix."""


class SoundWarning(UserWarning):
    """Audio that is readable but may be wrong. The message names the file and the fix."""


def nearest_name(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The most similar of the known names, or None if none has a similarity (`difflib`) of at least `cutoff`."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'X'?" for the nearest known name, or "" if none is near."""
    near = nearest_name(name, known)
    return f" Did you mean {near!r}?" if near else ""
