"""docs/reading.md names existing files and functions, and lists the same eight files as README.md."""

import ast
import re

import pytest

from tests.paths import REPOSITORY

PAGE = (REPOSITORY / "docs/reading.md").read_text(encoding="utf-8")
STOPS = re.findall(r"^### \d+\. [^:]+: `([\w.]+)` in \[([\w/.]+)\]", PAGE, re.MULTILINE)
FILES = re.findall(r"^\d+\. \[([\w/.]+)\]", PAGE, re.MULTILINE)
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def definitions(source: str) -> set[str]:
    """Names of the functions and classes of a module; a method is `Class.method`."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    top = [node for node in ast.parse(source).body if isinstance(node, kinds)]
    names = {node.name for node in top}
    for node in top:
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{member.name}" for member in node.body if isinstance(member, kinds)}
    return names


def test_the_page_has_eight_stops_and_the_eight_files_of_the_readme() -> None:
    assert (len(STOPS), len(FILES)) == (8, 8)
    assert re.findall(r"^\d+\. `([\w/.]+)`", README, re.MULTILINE) == FILES


@pytest.mark.parametrize(("function", "path"), STOPS)
def test_a_stop_is_a_function_of_its_file(function: str, path: str) -> None:
    assert function in definitions((REPOSITORY / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\[([\w/.]+\.py)\]", PAGE))))
def test_every_file_on_the_page_exists(path: str) -> None:
    assert (REPOSITORY / path).is_file()


def test_every_function_in_the_text_is_defined_in_a_file_of_the_page() -> None:
    paths = set(re.findall(r"\[([\w/.]+\.py)\]", PAGE))
    defined = set().union(*(definitions((REPOSITORY / path).read_text(encoding="utf-8")) for path in paths))
    assert set(re.findall(r"`([A-Z]\w+\.\w+)`", PAGE)) <= defined
