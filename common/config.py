"""One parser for all scripts: typed dataclasses, YAML recipes, `--section.field value` overrides.

A script has one settings dataclass whose fields are sections (dataclasses that live beside the code they set) or plain
values. `parse` makes of it `--config FILE.yaml`, `--section.field value`, `--print_config` and a `--help` in which the
string under a field is its help text. Later arguments win over earlier ones, and a file stands where it is named.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from common.console import set_up_console
from common.errors import UserError, nearest_name
from common.files import write_file

Settings = TypeVar("Settings")


def parse(
    settings_class: type[Settings], argv: Sequence[str] | None = None, description: str | None = None
) -> Settings:
    """Settings from the command line (`sys.argv` when `argv` is None) and the YAML files it names.

    `--help` and `--print_config` print and exit with 0. Raises UserError for an unknown field (with the nearest
    name), a value of the wrong type or a file that cannot be read; what a section's own `__post_init__` raises passes
    through.
    """
    parser = _parser(settings_class, description)
    return _build(settings_class, parser, lambda: parser.parse_args(None if argv is None else list(argv)))


def from_dict(settings_class: type[Settings], values: dict[str, Any]) -> Settings:
    """Settings from nested plain values, such as `to_dict` makes; missing fields take their defaults."""
    parser = _parser(settings_class, None)
    return _build(settings_class, parser, lambda: parser.parse_object(values))


def to_dict(settings: Any) -> dict[str, Any]:
    """A settings dataclass as nested dicts of JSON-able values: tuples become lists, paths strings."""
    return {field.name: _plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)}


def save_yaml(settings: Any, path: str | Path) -> None:
    """Write settings (a dataclass, or a dict from `to_dict`) where `--config` can read them. Atomic."""
    values = settings if isinstance(settings, dict) else to_dict(settings)
    write_file(Path(path), yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a file of `save_yaml`. Runs no code: only plain YAML types are accepted.

    Raises UserError when the file is missing, is not YAML, or is not a mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"the configuration {path} must be a mapping of fields, but is {type(values).__name__}")
    return values


def field_names(settings_class: Any) -> Iterator[str]:
    """Dotted names of all sections and fields of a settings dataclass."""
    for name, kind in _fields(settings_class):
        yield name
        if dataclasses.is_dataclass(kind):
            yield from (f"{name}.{inner}" for inner in field_names(kind))


def run_main(main: Callable[[], int | None], console_may_vanish: bool = False) -> NoReturn:
    """Run a script's `main` and leave the process with the right status.

    A UserError is printed as `error: ...` without a traceback: status 2. Anything else
    shows its traceback: status 1; Ctrl-C gives 130. In a process group nothing waits for the other ranks on the way
    out: a rank that failed alone would wait for ever in a collective that the others never enter.

    Text is UTF-8 regardless of the locale. With `console_may_vanish`, a closed stdout or stderr does not end the
    program (`common.console`).
    """
    if main.__module__ == "__main__":  # a test or a notebook owns its streams
        set_up_console(console_may_vanish)
    status = 0
    try:
        status = main() or 0
    except UserError as error:
        print(f"{_rank_prefix()}error: {error}", file=sys.stderr)
        _leave(2)
    except KeyboardInterrupt:
        print(f"{_rank_prefix()}interrupted", file=sys.stderr)
        _leave(130)
    except Exception:  # noqa: BLE001 - the outermost frame: reported in full, never swallowed
        print(f"{_rank_prefix()}{traceback.format_exc()}", file=sys.stderr, end="")
        _leave(1)
    sys.exit(status)


def _process_group() -> Any:
    """torch.distributed while a group is alive, else None; torch is not imported for the sake of an error message."""
    distributed = sys.modules.get("torch.distributed")
    alive = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed if alive else None


def _rank_prefix() -> str:
    group = _process_group()
    return f"[rank {group.get_rank()}] " if group is not None and group.get_world_size() > 1 else ""


def _leave(status: int) -> NoReturn:
    if _process_group() is None:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _fields(settings_class: Any) -> Iterator[tuple[str, Any]]:
    """(name, type) of every field; of `Section | None` the section."""
    hints = get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        kind = hints[field.name]
        options = get_args(kind) if get_origin(kind) in (Union, UnionType) else ()
        sections = [option for option in options if dataclasses.is_dataclass(option)]
        yield field.name, sections[0] if sections else kind


def _item_classes(settings_class: Any) -> Iterator[type]:
    """The dataclasses that stand in lists, of `list[Section]` the section."""
    for _, kind in _fields(settings_class):
        if dataclasses.is_dataclass(kind):
            yield from _item_classes(kind)
        yield from (item for item in get_args(kind) if isinstance(item, type) and dataclasses.is_dataclass(item))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


class _HelpFormatter(DefaultHelpFormatter):
    """Keeps the lines of a script's docstring: commands in it are to be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.strip().splitlines())


def _parser(settings_class: Any, description: str | None) -> ArgumentParser:
    # A recipe may come from anywhere: no value in it may make the parser import a module (`class_path: ...`). The items
    # of a list of sections are looked up by their path too; those are allowed, and imported already.
    items = [f"{kind.__module__}.{kind.__qualname__}" for kind in _item_classes(settings_class)]
    set_parsing_settings(
        docstring_parse_attribute_docstrings=True, import_path_denylist=["*"], import_path_allowlist=items
    )
    parser = ArgumentParser(
        exit_on_error=False,
        allow_abbrev=False,
        usage="%(prog)s [--config FILE.yaml] [--section.field value ...]",
        description=description,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", action="config", help="YAML file of settings; may be given several times")
    parser.add_class_arguments(settings_class, nested_key=None)
    return parser


def _build(settings_class: Any, parser: ArgumentParser, read: Callable[[], Namespace]) -> Any:
    try:
        values = read()
    except ArgumentError as error:
        raise UserError(_explain(str(error), settings_class)) from None
    except ImportError as error:  # the denial of _parser
        raise UserError(f"a setting names code to import, which no setting may do: {error}") from None
    for name, kind in _fields(settings_class):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and not isinstance(values[name], Namespace):
            if values[name] is None and type(None) in get_args(get_type_hints(settings_class)[name]):
                continue
            raise UserError(f"{name} is a section and must be a mapping of fields. Got value: {values[name]!r}")
    try:
        sections = parser.instantiate(values)
    except TypeError as error:
        raise UserError(f"a section of the configuration is not a mapping of fields: {error}") from error
    return _with_builtin_numbers(settings_class(**{name: sections[name] for name, _ in _fields(settings_class)}))


def _with_builtin_numbers(value: Any) -> Any:
    """The value with int and float in place of jsonargparse's restricted types, such as PositiveInt.

    They are subclasses, which YAML cannot write. Settings are changed in place.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            object.__setattr__(value, field.name, _with_builtin_numbers(getattr(value, field.name)))
        return value
    if isinstance(value, dict):
        return {key: _with_builtin_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_builtin_numbers(item) for item in value]
    if isinstance(value, int | float) and type(value) not in (bool, int, float):
        return int(value) if isinstance(value, int) else float(value)
    return value


def _explain(message: str, settings_class: type) -> str:
    """The parser's message in the project's words, with the nearest name for an unknown field."""
    unknown = re.findall(r"--([\w.\-]+)", message) if message.startswith("unrecognized arguments") else []
    if found := re.search(r"Group '([\w.]*)' does not accept option '([^']*)'", message):
        unknown = [f"{found[1]}.{found[2]}"]
    elif found := re.search(r"Option '([^']*)' is not accepted", message):
        parent = re.search(r"Parser key \"([\w.]+)\"", message)
        unknown = [f"{parent[1]}.{found[1]}" if parent else found[1]]
    if unknown:
        return "; ".join(f"unknown field {name!r}{_nearest(name, settings_class)}" for name in unknown)
    message = re.sub(r'Parser key "([\w.]+)":\s*', r"\1: ", message)
    message = re.sub(r"Problem with given class_path '[\w.]+':\s*", "", message)
    return re.sub(r"<class '([\w.]+)'>", r"\1", message)


def _nearest(name: str, settings_class: type) -> str:
    known = list(field_names(settings_class))
    near = [nearest_name(name, known, cutoff=0.7)]
    if not near[0]:  # perhaps the right field without its section, or in another one
        leaves = {other: other.rsplit(".", 1)[-1] for other in known}
        nearest = nearest_name(name.rsplit(".", 1)[-1], leaves.values(), cutoff=0.6)
        near = [other for other, leaf in leaves.items() if leaf == nearest]
    return f": did you mean {' or '.join(map(repr, near))}?" if near else "; --help lists the fields"
