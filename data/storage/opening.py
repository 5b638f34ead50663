"""Storage of a folder or a URL."""

from __future__ import annotations

import os

from data.storage.local import LocalStorage, Storage, StorageSettings


def open_storage(location: str | os.PathLike[str], settings: StorageSettings | None = None) -> Storage:
    """Open a folder or a URL (s3://, gs://, az://, hf://, https://, ...).

    Raises UserError for a URL of an unknown kind, or if its package is missing.
    """
    location, settings = os.fspath(location), settings or StorageSettings()
    if "://" not in location:
        return LocalStorage(location, settings)
    from data.storage.remote import RemoteStorage  # fsspec is slow to import

    return RemoteStorage(location, settings)
