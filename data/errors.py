"""The data engine's error for a user's mistake, and its warning about suspect audio."""


class DataError(ValueError):
    """Bad input or settings. The message names the file or field, the value, and what to do."""


class SoundWarning(UserWarning):
    """Audio that is readable but may be wrong. The message names the file and the fix."""
