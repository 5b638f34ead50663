"""Real speech from Debian packages: the actors of the game Fish Fillets, and the descriptions of Tux Paint's stamps.

Fish Fillets: `sound/LEVEL/LANGUAGE/ID.ogg`, texts in `script/LEVEL/*dialogs_LANGUAGE.lua` as
`dialogId("ID", "FONT", "English") dialogStr("text")`; each character has a font, which serves as the speaker id.
Tux Paint: `X_desc_LANGUAGE.ogg` next to `X.txt` with lines `LANGUAGE.utf8=text`.

Phrases repeat, so recordings are split by text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.errors import UserError
from common.hashing import hash_share
from data.audio.folders import is_clutter
from data.corpora.audio_files import FileSource
from data.corpora.base import check_not_empty
from data.corpora.debian_packages import package_folders
from data.recording import Recording

Part = Literal["fillets-cs", "fillets-nl", "tuxpaint"]
# Packages of each part.
PARTS = {
    "fillets-cs": ("fillets-ng-data", "fillets-ng-data-cs"),
    "fillets-nl": ("fillets-ng-data", "fillets-ng-data-nl"),
    "tuxpaint": ("tuxpaint-stamps-default",),
}
# Languages whose written descriptions match the audio; in others the texts may have changed since the recording.
_TUXPAINT_TEXTS = ("fr", "es", "ru", "ro")


@dataclass(frozen=True)
class DebianVoicesSettings:
    """Speech in Debian packages."""

    parts: list[Part] = field(default_factory=lambda: ["fillets-cs", "fillets-nl", "tuxpaint"])
    """Parts to use: fillets-cs (Czech actors, 106 min), fillets-nl (Dutch actors, 96 min), tuxpaint (short descriptions
    in 13 languages, 3 h; always in the train split)."""
    folder: str = ""
    """Folder of the .deb files, or of their content unpacked by `dpkg-deb -x`; empty: download them with apt-get."""
    cache: str = "~/.cache/bestrq"
    """Folder of unpacked packages (0.4 GB)."""
    held_out_languages: list[Literal["cs", "nl"]] = field(default_factory=lambda: ["cs"])
    """Languages of Fish Fillets with dev and test splits; other languages are in train only."""
    dev_share: float = 0.145
    """Share of the phrases of these languages in dev (15 minutes of Czech)."""
    test_share: float = 0.145
    """Share of the phrases of these languages in test."""

    def __post_init__(self) -> None:
        check_not_empty("parts", self.parts, PARTS)
        if min(self.dev_share, self.test_share) < 0 or self.dev_share + self.test_share >= 1:
            raise UserError(
                f"dev_share is {self.dev_share} and test_share {self.test_share}: both must be 0 or more, with a "
                "sum below 1"
            )


@dataclass(frozen=True)
class FilletsSettings(DebianVoicesSettings):
    """Speech in the game Fish Fillets."""

    parts: list[Part] = field(default_factory=lambda: ["fillets-cs", "fillets-nl"])
    """Parts to use: fillets-cs (Czech actors, 106 min), fillets-nl (Dutch actors, 96 min), tuxpaint (short descriptions
    in 13 languages, 3 h; always in the train split)."""


def sources(settings: DebianVoicesSettings) -> list[FileSource]:
    """List all recordings by part, sorted by id; missing packages are downloaded first.

    Raises UserError if a package cannot be downloaded or has no recordings.
    """
    packages = sorted({package for part in settings.parts for package in PARTS[part]})
    folders = package_folders(packages, settings.folder, Path(settings.cache).expanduser() / "debian_voices")
    listed: list[FileSource] = []
    for part in sorted(set(settings.parts)):
        name, _, language = part.partition("-")
        recordings = list(_fillets(folders, language, settings) if name == "fillets" else _tuxpaint(folders))
        if not recordings:
            where = ", ".join(map(str, folders))
            raise UserError(f"{part}: no recordings below {where}; it should hold the packages {', '.join(packages)}")
        listed += sorted(recordings, key=lambda source: source.id)
    return listed


def parse_dialogs(script: str) -> dict[str, tuple[str, str]]:
    """Dialogs of a Lua script: id -> (font, text), without untranslated ones.

    Parses only the calls `dialogId` and `dialogStr` with string literals and ignores everything else.
    """
    tokens = re.findall(
        r"""--\[\[.*?\]\]|--[^\n]*|("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|([A-Za-z_]\w*)|([()])""", script, re.DOTALL
    )
    dialogs: dict[str, tuple[str, str]] = {}
    call, arguments, current = "", [], None
    for literal, name, bracket in tokens:
        if literal:
            arguments.append(_unescape(literal[1:-1]))
        elif name:
            call, arguments = name, []
        elif bracket == ")":
            if call == "dialogId" and len(arguments) >= 2:
                current = arguments[:2]
            elif call == "dialogStr" and arguments and current:
                dialogs[current[0]] = (current[1], "".join(arguments))
                current = None
            call, arguments = "", []
    return dialogs


def _unescape(literal: str) -> str:
    """Value of a Lua string literal. `\\ddd` is a byte, so the text is decoded after all escapes are replaced."""
    simple = {"n": b"\n", "t": b"\t", "r": b"\r"}

    def byte(match: re.Match[bytes]) -> bytes:
        escape = match[1].decode()
        return bytes([int(escape) & 255]) if escape.isdigit() else simple.get(escape, match[1])

    return re.sub(rb"\\(\d{1,3}|.)", byte, literal.encode(), flags=re.DOTALL).decode("utf-8", "replace")


def _fillets(folders: list[Path], language: str, settings: DebianVoicesSettings) -> Iterator[FileSource]:
    by_level: dict[str, dict[str, tuple[str, str]]] = {}
    for script in _files(folders, f"**/script/*/*dialogs_{language}.lua"):
        by_level.setdefault(script.parent.name, {}).update(parse_dialogs(script.read_text(encoding="utf-8")))
    everywhere = {id: dialog for level in sorted(by_level) for id, dialog in by_level[level].items()}
    for path in _files(folders, f"**/sound/**/{language}/*.ogg"):
        level = path.parts[path.parts.index("sound") + 1 : -2]
        # A level may use audio of another level's script.
        font, text = by_level.get(level[0], {}).get(path.stem) or everywhere.get(path.stem) or ("", "")
        text = " ".join(text.split())
        key = _key(text)
        split = "train"
        if key and language in settings.held_out_languages:
            share = hash_share(f"fillets {language} {key}")
            if share < settings.test_share + settings.dev_share:
                split = "test" if share < settings.test_share else "dev"
        recording = Recording(
            id=f"fillets-{language}/{'/'.join(level)}/{path.stem}",
            text=text if key else None,
            language=language,
            speaker=f"fillets-{language}-{font.removeprefix('font_')}" if font else "",
            split=split,
        )
        yield FileSource(recording, path)


def _key(text: str) -> str:
    """Letters and digits of a text, the same for different spellings of a phrase."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def _tuxpaint(folders: list[Path]) -> Iterator[FileSource]:
    for path in _files(folders, "**/stamps/**/*_desc*.ogg"):
        match = re.fullmatch(r"(.+)_desc(?:_([a-z]+(?:_[A-Z]+)?))?\.ogg", path.name)
        if match is None:
            continue
        stamp, language = match[1], match[2] or "en"
        below = path.parts[path.parts.index("stamps") + 1 : -1]
        recording = Recording(
            id=f"tuxpaint-{language}/{'/'.join(below)}/{stamp}",
            text=_description(path.with_name(f"{stamp}.txt"), language) if language in _TUXPAINT_TEXTS else None,
            language=language,
            speaker=f"tuxpaint-{language}",
            split="train",
        )
        yield FileSource(recording, path)


def _description(path: Path, language: str) -> str | None:
    if not path.is_file():
        return None
    match = re.search(rf"^{language}\.utf8=(.*)$", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return match[1].strip() or None if match else None


def _files(folders: list[Path], pattern: str) -> list[Path]:
    paths = {path for folder in folders for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in paths if not is_clutter(path.name))
