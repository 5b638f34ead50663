"""What tests/test_readme.py runs for every command of README.md: the same command, made small.

A command of the README that is not here fails the test, and so does an entry whose command has left the README.
Commands run in the README's order in one folder, so a later one finds what an earlier one made.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from tiny import DATA, ENCODER, RUN


@dataclass(frozen=True)
class Run:
    """The command itself, with words exchanged and arguments added behind it; the last of two equal settings counts."""

    more: str = ""
    exchange: dict[str, str] = field(default_factory=dict)

    def of(self, command: str) -> str:
        for old, new in self.exchange.items():
            assert old in command, f"{old!r} is not in {command!r}"
            command = command.replace(old, new)
        return f"{command} {self.more}".strip()


@dataclass(frozen=True)
class Elsewhere:
    """Not run here, because of this: too big, or another test does it."""

    reason: str


TINY_RUN = " ".join([*ENCODER, *DATA, *RUN, "--run.steps=2", "--data.num_workers=0"])

COMMANDS: dict[str, Run | Elsewhere] = {}


def commands_in(markdown: str) -> list[str]:
    """Commands of the fenced blocks marked bash, in order: continued lines joined, comments and repetitions dropped."""
    commands: list[str] = []
    for block in re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            command = re.sub(r"(^|\s)#.*", "", line).removeprefix("$ ").strip()
            if command and command not in commands:
                commands.append(command)
    return commands


def readme_commands(repository: Path) -> list[str]:
    readme = repository / "README.md"
    return commands_in(readme.read_text()) if readme.exists() else []
