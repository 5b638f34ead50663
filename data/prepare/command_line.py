"""The command line of `python -m data.prepare`."""

from __future__ import annotations

import dataclasses
import re
import sys
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings

from common.errors import UserError, did_you_mean
from data.corpora.base import Corpus
from data.corpora.registry import CORPORA, find_corpus
from data.features import FeatureSettings
from data.prepare import prepare as prepare_module
from data.prepare.prepare import PrepareSettings, prepare


def usage() -> str:
    """The help of the command without a corpus."""
    width = max(map(len, CORPORA))
    listed = "\n".join(f"  {name:{width}}  {corpus.summary}" for name, corpus in CORPORA.items())
    return (
        f"usage: python -m data.prepare CORPUS --out DIR [--field value ...]\n\n{prepare_module.__doc__}\n"
        f"corpora:\n{listed}\n\n`python -m data.prepare CORPUS --help` lists the settings of a corpus."
    )


def parse(name: str, corpus: Corpus, arguments: Sequence[str]) -> tuple[Any, FeatureSettings, PrepareSettings]:
    """Settings from the command line: of the corpus and of the preparation as --field, of the features as
    --features.field. Dashes in names count as underscores, and lists may be written `a,b`.

    Raises UserError for a wrong value, and for an unknown name with the nearest known one.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"python -m data.prepare {name}", description=corpus.summary, exit_on_error=False, allow_abbrev=False
    )
    groups: dict[str | None, list[type]] = {None: [PrepareSettings, corpus.settings], "features": [FeatureSettings]}
    types = {f.name: str(f.type) for kind in groups[None] for f in dataclasses.fields(kind)}
    parser.add_argument("--config", action="config", help="YAML file of settings; may be given several times")
    for key, classes in groups.items():
        for kind in classes:
            parser.add_class_arguments(kind, key)
    try:
        values = parser.parse_args(_tidy(arguments, types)).as_dict()
    except ArgumentError as error:
        known = [option[2:] for action in parser._actions for option in action.option_strings if option[:2] == "--"]
        raise UserError(_explain(str(error), known)) from None
    fields = {kind: {f.name: values[f.name] for f in dataclasses.fields(kind)} for kind in groups[None]}
    settings = corpus.settings(**fields[corpus.settings])
    features = FeatureSettings(**values["features"])
    if corpus.features is not None and features == FeatureSettings():
        features = corpus.features(settings)
    return settings, features, PrepareSettings(**fields[PrepareSettings])


def _tidy(arguments: Sequence[str], types: Mapping[str, str]) -> list[str]:
    """Arguments as the parser wants them: `--a-b x` is `--a_b=x`, of a list `x,y` is `[x,y]`, a bare flag is true."""
    tidy: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            tidy.append("--" + name[2:].replace("-", "_") + equals + value)
        elif tidy and tidy[-1].startswith("--") and "=" not in tidy[-1]:
            tidy[-1] += f"={argument}"
        else:
            tidy.append(argument)
    lists = "|".join(name for name, kind in types.items() if kind.startswith("list")) or "(?!)"
    listed = re.compile(rf"(--(?:{lists})\+?=)(?!\[)(.*)", re.DOTALL)
    flags = {f"--{name}": f"--{name}=true" for name, kind in types.items() if kind == "bool"}
    return [listed.sub(r"\1[\2]", flags.get(argument, argument)) for argument in tidy]


def _explain(message: str, known: Sequence[str]) -> str:
    unknown = re.findall(r"--([\w.]+)", message) if message.startswith("unrecognized arguments") else []
    unknown += re.findall(r"Option '([^']*)' is not accepted", message)
    if unknown:
        return "; ".join(f"there is no setting {n!r}.{did_you_mean(n, known)} --help lists them" for n in unknown)
    return re.sub(r'Parser key "([\w.]+)":\s*', r"\1: ", message)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    try:
        prepare(name, *parse(name, find_corpus(name), rest))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: what is done is kept, the same command continues", file=sys.stderr)
        return 130
    return 0
