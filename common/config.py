"""Command-line and YAML parser of all programs: typed dataclasses, recipes, `--section.field value` overrides.

A program has one or more settings dataclasses, whose fields are sections (dataclasses defined next to the code that
uses them) or plain values. `parse` turns them into `--config FILE.yaml`, `--section.field value`, `--print_config` and
`--help`, with the string under a field as its help text. Later arguments override earlier arguments and files.
"""

from __future__ import annotations

import atexit
import dataclasses
import os
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, get_loader, set_loader, set_parsing_settings

from common.console import set_up_console
from common.errors import UserError
from common.files import read_bounded, write_file

Settings = TypeVar("Settings")


def parse(
    settings_class: type[Settings], argv: Sequence[str] | None = None, description: str | None = None
) -> Settings:
    """Read settings from the command line (`sys.argv` if `argv` is None) and the YAML files that it names.

    `--help` and `--print_config` print and exit with 0. Raises UserError for an unknown field (with the nearest
    name), a value of the wrong type or an unreadable file. Errors of a section's `__post_init__` propagate.
    """
    return parse_sections({None: [settings_class]}, argv, description=description)[0]


def parse_sections(
    sections: Mapping[str | None, Sequence[type]],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    program: str | None = None,
) -> list[Any]:
    """Read several settings classes from one command line, like `parse`. Return them in the order of the classes.

    Args:
        sections: classes by the name of the section with their fields; None is the top level.
        program: command in the usage line.
    """
    parser = _parser(sections, description, program)
    return _build(sections, parser, lambda: parser.parse_args(None if argv is None else list(argv)))


def from_dict(settings_class: type[Settings], values: dict[str, Any]) -> Settings:
    """Settings from nested plain values, such as those of `to_dict`; missing fields get their defaults."""
    if not isinstance(values, dict):
        raise UserError(f"settings of {settings_class.__name__} must be a mapping of fields, but are {values!r}")
    sections: Mapping[str | None, Sequence[type]] = {None: [settings_class]}
    parser = _parser(sections)
    return _build(sections, parser, lambda: parser.parse_object(values))[0]


def to_dict(settings: Any) -> dict[str, Any]:
    """Convert a settings dataclass to nested dicts of JSON values: tuples become lists, paths strings."""
    return {field.name: _plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)}


def save_yaml(settings: Any, path: str | Path) -> None:
    """Write settings (a dataclass, or a dict from `to_dict`) to a file that `--config` can read. Atomic."""
    values = settings if isinstance(settings, dict) else to_dict(settings)
    write_file(Path(path), yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a file of `save_yaml`. Only plain YAML types are accepted, so no code runs.

    Raises UserError if the file is missing, is no regular file, is not YAML, or is not a mapping.
    """
    try:
        values = _plain_yaml(yaml.safe_load, read_bounded(Path(path)).decode())
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"the configuration {path} must be a mapping of fields, but is {type(values).__name__}")
    return values


def _without_aliases(text: str) -> str:
    """Return the text if it is YAML without aliases, a few of which can stand for more values than fit into memory."""
    if "*" in text and "&" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
        raise UserError("a configuration has a YAML alias (*name): write the value in its place")
    return text


def _plain_yaml(load: Callable[[str], Any], text: str) -> Any:
    """Value of YAML without aliases. Raises yaml.YAMLError also for what no value can represent."""
    try:
        return load(_without_aliases(text))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # dates such as 2001-99-99, numbers such as 0x_, deep nesting
        raise yaml.YAMLError(f"not a value: {error}") from error


set_loader("yaml", partial(_plain_yaml, get_loader("yaml")), (yaml.YAMLError,))


def field_names(settings_class: Any) -> Iterator[str]:
    """Dotted names of all sections and fields of a settings dataclass."""
    for name, kind in _fields(settings_class):
        yield name
        if dataclasses.is_dataclass(kind):
            yield from (f"{name}.{inner}" for inner in field_names(kind))


def run_main(main: Callable[[], int | None], console_may_vanish: bool = False) -> NoReturn:
    """Run a script's `main` and exit with its status.

    A UserError is printed as `error: ...` without a traceback and exits with 2, Ctrl-C with 130; any other exception
    prints its traceback and exits with 1.

    Text is UTF-8 regardless of the locale. With `console_may_vanish`, a closed stdout or stderr does not end the
    program (`common.console`).
    """
    if main.__module__ == "__main__":  # not in a test or a notebook, whose streams must not change
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
    except Exception:  # noqa: BLE001 - the outermost frame, which reports it in full
        print(f"{_rank_prefix()}{traceback.format_exc()}", file=sys.stderr, end="")
        _leave(1)
    _leave(status)


def _rank_prefix() -> str:
    distributed: Any = sys.modules.get("torch.distributed")  # torch is not imported for it
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return ""
    return f"[rank {distributed.get_rank()}] " if distributed.get_world_size() > 1 else ""


def _leave(status: int) -> NoReturn:
    """Exit. One of several processes skips the shutdown of torch and of the interpreter.

    After a failure it would block in a collective that the other ranks never enter. After success it aborts the
    process once in a while: a thread of gloo, which lives as long as DDP holds the group, releases the tensor of the
    last collective when the interpreter has gone.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or "torch.distributed" not in sys.modules:
        sys.exit(status)
    if status == 0:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _fields(settings_class: Any) -> Iterator[tuple[str, Any]]:
    """Name and type of every field; for `Section | None`, the section."""
    hints = get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        kind = hints[field.name]
        options = get_args(kind) if get_origin(kind) in (Union, UnionType) else ()
        sections = [option for option in options if dataclasses.is_dataclass(option)]
        yield field.name, sections[0] if sections else kind


def _item_classes(settings_class: Any) -> Iterator[type]:
    """Dataclasses that are items of lists: Section for `list[Section]`."""
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
    """Formatter that keeps the line breaks of a script's docstring, so that its commands can be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.strip().splitlines())


def _parser(
    sections: Mapping[str | None, Sequence[type]], description: str | None = None, program: str | None = None
) -> ArgumentParser:
    # Recipes are untrusted: no value may make the parser import a module (`class_path: ...`). Items of a list of
    # sections are looked up by their path too; these are allowed, as they are already imported.
    classes = [kind for group in sections.values() for kind in group]
    items = [f"{item.__module__}.{item.__qualname__}" for kind in classes for item in _item_classes(kind)]
    set_parsing_settings(
        docstring_parse_attribute_docstrings=True, import_path_denylist=["*"], import_path_allowlist=items
    )
    parser = ArgumentParser(
        prog=program,
        exit_on_error=False,
        allow_abbrev=False,
        usage="%(prog)s [--config FILE.yaml] [--section.field value ...]",
        description=description,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", action="config", help="YAML file of settings; may be given several times")
    for section, group in sections.items():
        for kind in group:
            parser.add_class_arguments(kind, section)
    return parser


def _build(
    sections: Mapping[str | None, Sequence[type]], parser: ArgumentParser, read: Callable[[], Namespace]
) -> list[Any]:
    known = [
        f"{section}.{name}" if section else name
        for section, group in sections.items()
        for kind in group
        for name in field_names(kind)
    ]
    try:
        values = read()
    except ArgumentError as error:
        from common.config_messages import explain  # imported only for an error

        raise UserError(explain(str(error), known)) from None
    except ImportError as error:  # import_path_denylist
        raise UserError(f"a setting names code to import, which is not allowed: {error}") from None
    except OverflowError as error:
        raise UserError(f"a number of the configuration is too large: {error}") from None
    except UnicodeError as error:  # lone surrogates
        raise UserError(f"a text of the configuration is not Unicode: {error}") from None
    for kind in sections.get(None, ()):
        _check_values(kind, values)
    try:
        built = parser.instantiate(values)
    except TypeError as error:
        raise UserError(f"a section of the configuration is not a mapping of fields: {error}") from error
    settings = []
    for section, group in sections.items():
        for kind in group:
            settings.append(built[section] if section else kind(**{name: built[name] for name, _ in _fields(kind)}))
    return [_unrestricted(instance) for instance in settings]


def _unrestricted(value: Any) -> Any:
    """Settings with plain numbers in place of those of `jsonargparse.typing`, which YAML cannot represent."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_unrestricted, value))
    if isinstance(value, dict):
        return {name: _unrestricted(inner) for name, inner in value.items()}
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            object.__setattr__(value, field.name, _unrestricted(getattr(value, field.name)))  # even if frozen
    plain = next((kind for kind in (int, float) if isinstance(value, kind)), None)
    return value if plain is None or isinstance(value, bool) else plain(value)


def _check_values(settings_class: type, values: Namespace, prefix: str = "") -> None:
    """Raise UserError unless every section is a mapping and every value is not null, or may be null."""
    hints = get_type_hints(settings_class)
    for name, kind in _fields(settings_class):
        value, is_section = values[name], isinstance(kind, type) and dataclasses.is_dataclass(kind)
        if value is None and type(None) in get_args(hints[name]):
            continue
        if is_section and not isinstance(value, Namespace):
            raise UserError(f"{prefix}{name} is a section and must be a mapping of fields. Got value: {value!r}")
        if value is None:
            raise UserError(f"{prefix}{name} is null: leave it out for its default, or give a value")
        if is_section:
            _check_values(kind, value, f"{prefix}{name}.")
