"""Debian packages as folders of files, with no root and no installation: `apt-get download`, then `dpkg-deb -x`."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from common.errors import UserError


def package_folders(packages: list[str], given: str, cache: Path) -> list[Path]:
    """Folders in which the files of the packages lie.

    Args:
        packages: names of Debian packages.
        given: folder with their .deb files or with their unpacked content; empty: fetch them.
        cache: where packages are unpacked, one folder each; what is there is not fetched again.
    Raises:
        UserError: saying what was being fetched or unpacked and what to do.
    """
    if given:
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise UserError(f"folder is {given!r}: there is no such folder")
        archives = [archive for package in packages for archive in sorted(folder.glob(f"{package}_*.deb"))[-1:]]
        if not archives:
            return [folder]  # already unpacked: the corpus finds out whether everything is there
        names = [archive.name.split("_")[0] for archive in archives]
        missing = [package for package in packages if package not in names]
        if missing:
            raise UserError(f"folder {given} has no .deb file of {', '.join(missing)}: get it with {_command(missing)}")
        return [_unpack(archive, cache / archive.stem) for archive in archives]
    missing = [package for package in packages if not (cache / package).is_dir()]
    if missing:
        print(f"fetching Debian packages: {', '.join(missing)}", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as temporary:
            for archive in _download(missing, Path(temporary)):
                _unpack(archive, cache / archive.name.split("_")[0])
    return [cache / package for package in packages]


def _command(packages: list[str]) -> str:
    return f"`apt-get download {' '.join(packages)}`"


def _download(packages: list[str], folder: Path) -> list[Path]:
    """Fetch the packages' .deb files into a folder."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise _failure(packages, "this system has no apt-get or no dpkg-deb")
    error = _run(["apt-get", "download", *packages], folder)
    if error:
        # The system may have no package lists (containers), or stale ones. A list of our own needs no root.
        lists, archives = folder / "lists", folder / "archives"
        (lists / "partial").mkdir(parents=True)
        (archives / "partial").mkdir(parents=True)
        options = (f"Dir::State::lists={lists}", f"Dir::Cache={archives}", "Debug::NoLocking=1")
        own = ["apt-get", *(argument for option in options for argument in ("-o", option))]
        error = _run([*own, "-o", "APT::Update::Error-Mode=any", "update"], folder) or _run(
            [*own, "download", *packages], folder
        )
    archives_found = sorted(folder.glob("*.deb"))
    if error or len(archives_found) != len(packages):
        raise _failure(packages, error or f"only {len(archives_found)} of {len(packages)} came")
    return archives_found


def _failure(packages: list[str], reason: str) -> UserError:
    return UserError(
        f"could not fetch the Debian packages {', '.join(packages)} ({reason}). Check that this machine reaches its "
        "Debian or Ubuntu mirror (apt honours http_proxy; on Ubuntu they are in 'universe') and run again; or on a "
        f"machine that does, run {_command(packages)} and give the folder with the .deb files as --folder"
    )


def _unpack(archive: Path, target: Path) -> Path:
    """The folder with the archive's files; it appears complete or not at all."""
    if target.is_dir():
        return target
    if shutil.which("dpkg-deb") is None:
        raise UserError(f"unpacking {archive} needs dpkg-deb: unpack it elsewhere and give that folder as --folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="unpack-") as temporary:
        content = Path(temporary) / "content"
        error = _run(["dpkg-deb", "-x", str(archive.resolve()), str(content)], target.parent)
        if error:
            raise UserError(f"could not unpack {archive} ({error}); fetch it again; the disk needs 1 GB free")
        if not target.is_dir():  # another process may have been faster
            content.rename(target)
    return target


def _run(command: list[str], folder: Path) -> str:
    """Run a command in a folder. Returns '' when it succeeded, else the last line that it wrote as an error."""
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode == 0:
        return ""
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E:")]
    return (errors or lines or [f"{command[0]} ended with {done.returncode}"])[-1]
