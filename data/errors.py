"""The one error that the data engine raises for a user's mistake."""


class DataError(ValueError):
    """Bad input or settings. The message names the file or field, the value, and what to do."""
