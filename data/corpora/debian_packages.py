"""Files of Debian packages without root or installation: `apt-get download`, then `dpkg-deb -x`."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from common.errors import UserError


def package_folders(packages: list[str], given: str, cache: Path) -> list[Path]:
    """Folders with the files of packages, which are downloaded or unpacked first if necessary.

    Args:
        packages: names of Debian packages.
        given: folder with their .deb files or with their unpacked content; empty: download them.
        cache: folder of unpacked packages, one folder each.
    Raises:
        UserError: a package cannot be downloaded or unpacked; the message gives the fix.
    """
    if given:
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise UserError(f"folder is {given!r}: no such folder")
        archives = [archive for package in packages for archive in sorted(folder.glob(f"{package}_*.deb"))[-1:]]
        if not archives:
            return [folder]  # already unpacked; the corpus checks its content
        names = [archive.name.split("_")[0] for archive in archives]
        missing = [package for package in packages if package not in names]
        if missing:
            raise UserError(f"folder {given} has no .deb file of {', '.join(missing)}: get it with {_command(missing)}")
        return [_unpack(archive, cache / archive.stem) for archive in archives]
    missing = [package for package in packages if not (cache / package).is_dir()]
    if missing:
        print(f"downloading Debian packages: {', '.join(missing)}", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as temporary:
            for archive in _download(missing, Path(temporary)):
                _unpack(archive, cache / archive.name.split("_")[0])
    return [cache / package for package in packages]


def _command(packages: list[str]) -> str:
    return f"`apt-get download {' '.join(packages)}`"


def _download(packages: list[str], folder: Path) -> list[Path]:
    """Download the .deb files of packages into a folder. Raises UserError."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise _failure(packages, "this system has no apt-get or no dpkg-deb")
    error = _run(["apt-get", "download", *packages], folder)
    if error:
        # The system may have no package lists (containers), or stale ones. Separate lists need no root.
        lists, archives = folder / "lists", folder / "archives"
        (lists / "partial").mkdir(parents=True)
        (archives / "partial").mkdir(parents=True)
        options = (f"Dir::State::lists={lists}", f"Dir::Cache={archives}", "Debug::NoLocking=1")
        apt_get = ["apt-get", *(argument for option in options for argument in ("-o", option))]
        error = _run([*apt_get, "-o", "APT::Update::Error-Mode=any", "update"], folder) or _run(
            [*apt_get, "download", *packages], folder
        )
    files = sorted(folder.glob("*.deb"))
    if error or len(files) != len(packages):
        raise _failure(packages, error or f"got only {len(files)} of {len(packages)}")
    return files


def _failure(packages: list[str], reason: str) -> UserError:
    return UserError(
        f"could not download the Debian packages {', '.join(packages)} ({reason}). Check that this machine can access "
        "its Debian or Ubuntu mirror (apt uses http_proxy; on Ubuntu they are in 'universe') and run again; or run "
        f"{_command(packages)} on another machine and give the folder with the .deb files as --folder"
    )


def _unpack(archive: Path, target: Path) -> Path:
    """Unpack an archive atomically. Returns the folder with its files."""
    if target.is_dir():
        return target
    if shutil.which("dpkg-deb") is None:
        raise UserError(f"unpacking {archive} needs dpkg-deb: unpack it elsewhere and give the folder as --folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="unpack-") as temporary:
        content = Path(temporary) / "content"
        error = _run(["dpkg-deb", "-x", str(archive.resolve()), str(content)], target.parent)
        if error:
            raise UserError(f"could not unpack {archive} ({error}): download it again; it needs 1 GB of disk space")
        if not target.is_dir():  # another process may have created it in the meantime
            content.rename(target)
    return target


def _run(command: list[str], folder: Path) -> str:
    """Run a command in a folder; return '' on success, else the last line of its error output."""
    result = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if result.returncode == 0:
        return ""
    lines = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E:")]
    return (errors or lines or [f"{command[0]} ended with {result.returncode}"])[-1]
