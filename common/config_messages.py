"""Errors of the parser of settings in the project's terms. Imported only for an error."""

from __future__ import annotations

import re
from collections.abc import Sequence

from common.errors import did_you_mean, nearest_name

# Descriptions of the types of `jsonargparse.typing` and of null, for error messages.
_EXPECTED = {
    "PositiveInt": "an integer above 0",
    "NonNegativeInt": "an integer, 0 or more",
    "PositiveFloat": "a number above 0",
    "NonNegativeFloat": "a number, 0 or more",
    "ClosedUnitInterval": "a number from 0 to 1",
    "OpenUnitInterval": "a number between 0 and 1",
    "NoneType": "null",
}


def explain(message: str, known: Sequence[str]) -> str:
    """The parser's message in the project's terms, with the nearest name for an unknown field."""
    if message.startswith("Unexpected config:"):  # followed by the content of the file, which may be secret
        return "a file given as --config or `config` is not a mapping of fields: give YAML with lines `section: ...`"
    unknown = re.findall(r"--([\w.\-]+)", message) if message.startswith("unrecognized arguments") else []
    if match := re.search(r"Group '([\w.]*)' does not accept option '([^']*)'", message):
        unknown = [f"{match[1]}.{match[2]}"]
    elif match := re.search(r"Option '([^']*)' is not accepted", message):
        parent = re.search(r"Parser key \"([\w.]+)\"", message)
        unknown = [f"{parent[1]}.{match[1]}" if parent else match[1]]
    if unknown:
        return "; ".join(f"unknown field {name!r}{_nearest(name, known)}" for name in unknown)
    message = re.sub(r'Parser key "([\w.]+)":\s*', r"\1: ", message)
    message = re.sub(r"Problem with given class_path '[\w.]+':\s*", "", message)
    message = re.sub(r"<class '([\w.]+)'>", r"\1", message)
    if match := re.fullmatch(r"(.+): Not of type (\w+): .* not '(list|dict|NoneType)'", message):
        value = {"list": "a list", "dict": "a mapping", "NoneType": "null"}[match[3]]
        return f"{match[1]} is {value}: expected {_EXPECTED.get(match[2], match[2])}"
    if match := re.fullmatch(r"(.+): Not of type (\w+): (?:(\S+) does not conform.*|.*('.*'))", message):
        return f"{match[1]} is {match[3] or match[4]}: expected {_EXPECTED.get(match[2], match[2])}"
    if match := re.fullmatch(r"(.+): Expected a typing\.Literal\[(.*)\]\. Got value: (.*)", message):
        choices = [choice.strip("'") for choice in match[2].split(", ")]
        return f"{match[1]} is {match[3]!r}, expected one of {', '.join(choices)}.{did_you_mean(match[3], choices)}"
    pattern = (
        r"(?s)(.+): Does not validate against any of the Union subtypes\n\s*Subtypes: \[(.*?)\]\n.*Given value: (.*)"
    )
    if (match := re.fullmatch(pattern, message)) and any(name in match[2] for name in _EXPECTED):
        kinds = [kind.rsplit(".", 1)[-1] for kind in match[2].split(", ")]
        return f"{match[1]} is {match[3]}: expected {' or '.join(_EXPECTED.get(kind, kind) for kind in kinds)}"
    return message


def _nearest(name: str, known: Sequence[str]) -> str:
    near = [nearest_name(name, known, cutoff=0.7)]
    if not near[0]:  # perhaps a field without its section, or in another section
        leaves = {other: other.rsplit(".", 1)[-1] for other in known}
        nearest = nearest_name(name.rsplit(".", 1)[-1], leaves.values(), cutoff=0.6)
        near = [other for other, leaf in leaves.items() if leaf == nearest]
    return f": did you mean {' or '.join(map(repr, near))}?" if near else "; --help lists the fields"
