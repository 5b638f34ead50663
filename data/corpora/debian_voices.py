"""Real speech from Debian packages: the actors of the game Fish Fillets, and the descriptions of Tux Paint's stamps.

Fish Fillets: `sound/LEVEL/LANGUAGE/ID.ogg`, texts in `script/LEVEL/*dialogs_LANGUAGE.lua` as
`dialogId("ID", "FONT", "English") dialogStr("text")`; a font is a character, so it stands for the speaker.
Tux Paint: `X_desc_LANGUAGE.ogg` beside `X.txt` with lines `LANGUAGE.utf8=text`.

Phrases repeat, so the splits are made by text and not by file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from data.audio.folders import is_clutter
from data.corpora.base import FileSource, check_choice, hash_share
from data.corpora.debian_packages import package_folders
from data.format.schema import Recording

PARTS = {
    "fillets-cs": ("fillets-ng-data", "fillets-ng-data-cs"),
    "fillets-nl": ("fillets-ng-data", "fillets-ng-data-nl"),
    "tuxpaint": ("tuxpaint-stamps-default",),
}
# In these languages the written descriptions were found to be what is said; elsewhere they may have changed since.
_TUXPAINT_TEXTS = ("fr", "es", "ru", "ro")


@dataclass(frozen=True)
class DebianVoicesSettings:
    """The voices in Debian's packages."""

    parts: list[str] = field(default_factory=lambda: list(PARTS))
    """What to use: fillets-cs (Czech actors, 106 min), fillets-nl (Dutch actors, 96 min), tuxpaint (short descriptions
    in 12 languages, 3 h; always in the train split)."""
    folder: str = ""
    """Folder with the packages' .deb files, or with what `dpkg-deb -x` made of them; empty: fetch them by apt-get."""
    cache: str = "~/.cache/bestrq"
    """Folder where fetched packages are unpacked and kept (0.4 GB)."""
    held_out_languages: list[str] = field(default_factory=lambda: ["cs"])
    """Languages of Fish Fillets of which a part goes to dev and test; of the others everything goes to train."""
    dev_share: float = 0.145
    """Share of the phrases of those languages that goes to dev (of Czech, 15 minutes)."""
    test_share: float = 0.145
    """Share of the phrases of those languages that goes to test."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise UserError(f"parts is empty: name at least one of {', '.join(PARTS)}")
        for part in self.parts:
            check_choice("parts", part, list(PARTS))
        for language in self.held_out_languages:
            check_choice("held_out_languages", language, ["cs", "nl"])
        if min(self.dev_share, self.test_share) < 0 or self.dev_share + self.test_share >= 1:
            raise UserError(
                f"dev_share is {self.dev_share} and test_share {self.test_share}: both must be 0 or more, and leave "
                "something to train"
            )


@dataclass(frozen=True)
class FilletsSettings(DebianVoicesSettings):
    """The voices of Fish Fillets."""

    parts: list[str] = field(default_factory=lambda: ["fillets-cs", "fillets-nl"])
    """What to use: fillets-cs (Czech actors, 106 min), fillets-nl (Dutch actors, 96 min), tuxpaint (short descriptions
    in 12 languages, 3 h; always in the train split)."""


def sources(settings: DebianVoicesSettings) -> list[FileSource]:
    """All recordings, sorted by id; packages that are not there are fetched first.

    Raises UserError when a package cannot be fetched, or its content is not found.
    """
    packages = sorted({package for part in settings.parts for package in PARTS[part]})
    folders = package_folders(packages, settings.folder, Path(settings.cache).expanduser() / "debian_voices")
    found: list[FileSource] = []
    for part in sorted(set(settings.parts)):
        name, _, language = part.partition("-")
        listed = list(_fillets(folders, language, settings) if name == "fillets" else _tuxpaint(folders))
        if not listed:
            where = ", ".join(map(str, folders))
            raise UserError(f"{part}: no recordings below {where}; are the packages {', '.join(packages)} there?")
        found += sorted(listed, key=lambda source: source.id)
    return found


def parse_dialogs(script: str) -> dict[str, tuple[str, str]]:
    """The dialogs of a Lua script: id -> (font, text). One without a text, not yet translated, is left out.

    Reads only the two calls `dialogId` and `dialogStr` with string literals, and passes over anything else.
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
    """A Lua string literal's value. `\\ddd` is a byte, so the text becomes UTF-8 only after all are in place."""
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
        # A level may play what another level's script says.
        font, text = by_level.get(level[0], {}).get(path.stem) or everywhere.get(path.stem) or ("", "")
        text = " ".join(text.split())
        spoken = _key(text)
        split = "train"
        if spoken and language in settings.held_out_languages:
            share = hash_share(f"fillets {language} {spoken}")
            if share < settings.test_share + settings.dev_share:
                split = "test" if share < settings.test_share else "dev"
        recording = Recording(
            id=f"fillets-{language}/{'/'.join(level)}/{path.stem}",
            text=text if spoken else None,
            language=language,
            speaker=f"fillets-{language}-{font.removeprefix('font_')}" if font else "",
            split=split,
        )
        yield FileSource(recording, path)


def _key(text: str) -> str:
    """The letters and digits of a text: what two spellings of the same phrase have in common."""
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
    found = re.search(rf"^{language}\.utf8=(.*)$", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return found[1].strip() or None if found else None


def _files(folders: list[Path], pattern: str) -> list[Path]:
    found = {path for folder in folders for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not is_clutter(path.name))
