"""`python -m data.shards COMMAND`: verify, inspect and summarise datasets, and derive new ones."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from common.console import set_up_console
from common.cores import available_cores
from common.errors import UserError, did_you_mean
from common.files import write_file
from data.format.dataset import open_dataset
from data.format.schema import LABELS
from data.shards.inspect import describe, draw, summary, totals
from data.shards.integrity import find_faults
from data.shards.join import add_join
from data.shards.select import add_filter, add_merge, add_split
from data.shards.stats import csv_text, statistics_table

_MAX_PRINTED = 50


class Parser(argparse.ArgumentParser):
    """Parser that raises UserError, which is printed in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Exit code: 0; 1 if `verify` found damage; 2 for a user's mistake; 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parser, commands = build_parser()
        _check_names(arguments, commands)
        options = parser.parse_args(arguments)
        run: Callable[[argparse.Namespace], int] = options.run
        return run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has exited, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def build_parser() -> tuple[Parser, dict[str, argparse.ArgumentParser]]:
    """Return the parser, and the parsers of the commands by name."""
    parser = Parser(prog="python -m data.shards", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, description: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=description, description=description + ".", allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    check = add("verify", "read every byte and list all damage; exit code 1 if there is any", _verify)
    _add_dir(check)
    check.add_argument(
        "--workers", type=_positive, default=available_cores(), help="processes (default: one per core, %(default)s)"
    )
    check.add_argument("--list", type=Path, metavar="FILE", help="write the damage as JSON lines: id, file, problem")

    show = add("inspect", "show totals, or one recording", _inspect)
    _add_dir(show)
    show.add_argument("--id", help="show this recording")
    show.add_argument(
        "--png", type=Path, metavar="FILE", help="save the recording's spectrogram with its words as a PNG picture"
    )
    show.add_argument(
        "--start", type=_seconds, default=0.0, help="start of the picture and the words, in seconds (default: 0)"
    )
    show.add_argument(
        "--seconds", type=_seconds, default=30.0, help="duration of the picture and the words (default: %(default)s)"
    )
    show.add_argument("--json", action="store_true", help="print one JSON object")

    stats = add("stats", "print a table of durations, texts and speech rate", _stats)
    _add_dir(stats)
    stats.add_argument("--by", choices=LABELS, help="one row per value (default: one row for all)")
    stats.add_argument("--csv", type=Path, metavar="FILE", help="also write the table to this file")

    add_split(add)
    add_filter(add)
    add_merge(add)
    add_join(add)
    return parser, dict(commands.choices)


def _check_names(arguments: Sequence[str], commands: dict[str, argparse.ArgumentParser]) -> None:
    """Raise UserError for an unknown command or option, with the most similar name."""
    if not arguments or arguments[0].startswith("-"):
        return
    if arguments[0] not in commands:
        near = did_you_mean(arguments[0], list(commands))
        raise UserError(f"no command {arguments[0]!r}; commands are {', '.join(commands)}.{near}")
    known = [name for action in commands[arguments[0]]._actions for name in action.option_strings]
    for argument in arguments[1:]:
        name = argument.split("=", 1)[0]
        if name.startswith("--") and len(name) > 2 and name not in known:
            raise UserError(f"{arguments[0]} has no option {name!r}.{did_you_mean(name, known)} --help lists them")


def _add_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument("dir", metavar="DIR", help="dataset: a folder, or a URL of object storage")


def _positive(value: str) -> int:
    if not value.isdecimal() or not 1 <= int(value) <= 4096:
        raise argparse.ArgumentTypeError(f"is {value!r}, must be an integer from 1 to 4096")
    return int(value)


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise argparse.ArgumentTypeError(f"is {value!r}, must be a number of seconds, 0 or more")
    return seconds


def _verify(options: argparse.Namespace) -> int:
    dataset = open_dataset(options.dir, check=False)
    faults = find_faults(dataset, options.workers)
    for fault in faults[:_MAX_PRINTED]:
        print(fault.problem)
    if len(faults) > _MAX_PRINTED:
        print(f"... and {len(faults) - _MAX_PRINTED} more{'' if options.list else '; --list FILE writes all'}")
    if options.list:
        lines = [json.dumps({"id": f.id, "file": f.file, "problem": f.problem}, ensure_ascii=False) for f in faults]
        _write(options.list, "".join(f"{line}\n" for line in lines))
    damaged = len({fault.id for fault in faults} - {None})
    files = len({fault.file for fault in faults if fault.id is None})
    print(f"{options.dir}: {damaged} of {len(dataset)} recordings are damaged{f', and {files} files' if files else ''}")
    return 1 if faults else 0


def _inspect(options: argparse.Namespace) -> int:
    dataset = open_dataset(options.dir, check=False)
    if options.id is None and options.png is None:
        fields = totals(dataset)
        print(json.dumps(fields) if options.json else summary(fields))
        return 0
    recording = 0 if options.id is None else int(dataset.select(ids=[options.id])[0])
    described = describe(dataset, recording, options.start, options.seconds)
    if options.png is not None:
        draw(dataset, recording, options.png, options.start, options.seconds)
        described["png"] = str(options.png)
    print(json.dumps(described) if options.json else _lines(described))
    return 0


def _lines(described: dict[str, Any]) -> str:
    words = described.pop("words")
    lines = [f"{name:12} {'-' if value in ('', None) else value}" for name, value in described.items()]
    for word in words:
        confidence = "" if word["confidence"] is None else f"  ({word['confidence']:.2f})"
        lines.append(f"{word['start']:12.2f} {word['end']:8.2f}  {word['word']}{confidence}")
    return "\n".join(lines)


def _stats(options: argparse.Namespace) -> int:
    header, rows = statistics_table(open_dataset(options.dir, check=False), options.by)
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
    if options.csv:
        _write(options.csv, csv_text([header, *rows]))
    return 0


def _write(path: Path, text: str) -> None:
    try:
        write_file(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); choose another file") from error


if __name__ == "__main__":
    set_up_console()
    sys.exit(main())
