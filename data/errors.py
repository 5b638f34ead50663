"""The error that the data engine raises for a user's mistake, and the warning about sound that it reads."""


class DataError(ValueError):
    """Bad input or settings. The message names the file or field, the value, and what to do."""


class SoundWarning(UserWarning):
    """Sound that can be read, and may not be what it should be. The message names the file and what to do."""
