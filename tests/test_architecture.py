"""Imports between files and folders: no cycles, only allowed directions, and few files reached by pretrain.py."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.paths import REPOSITORY

LIBRARIES = ("common", "bestrq", "data", "pipelines", "tools", "experiments", "launch", "benchmarks")
FILES = sorted(
    path.relative_to(REPOSITORY)
    for path in [*REPOSITORY.glob("*.py"), *(p for name in LIBRARIES for p in (REPOSITORY / name).rglob("*.py"))]
)
MODULES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}

# Folder -> folders whose modules it may import, besides its own. `data` holds the modules directly in data/.
ALLOWED: dict[str, set[str]] = {
    "common": set(),
    "bestrq/model": {"common"},
    "bestrq/training": {"common"},
    "bestrq/decoding": {"common"},
    "bestrq/pretraining": {"common", "bestrq/model", "bestrq/training"},
    "bestrq/recognition": {"common", "bestrq/model", "bestrq/training", "bestrq/decoding"},
    "bestrq/long_form": {"common", "bestrq/model", "bestrq/decoding", "bestrq/recognition"},
    "bestrq/alignment": {"common", "bestrq/decoding", "bestrq/long_form"},
    "bestrq/transcripts": {"common", "bestrq/decoding"},
    "bestrq/scoring": {"common", "bestrq/transcripts"},
    "bestrq/report": {"common", "bestrq/scoring", "bestrq/transcripts"},
    "data": {"common"},
    "data/splits": {"common"},
    "data/storage": {"common"},
    "data/audio": {"common", "data"},
    "data/word_times": {"common", "data"},
    "data/format": {"common", "data", "data/storage"},
    "data/loading": {"common", "data", "data/format", "data/storage"},
    "data/shards": {"common", "data", "data/format", "data/storage", "data/word_times"},
    "data/corpora": {"common", "data", "data/audio", "data/word_times", "data/splits", "data/format", "data/storage"},
    "data/prepare": {"common", "data", "data/audio", "data/corpora", "data/format", "data/word_times"},
}
LIBRARY_FOLDERS = set(ALLOWED)
ALLOWED["pipelines"] = LIBRARY_FOLDERS
SCRIPTS = LIBRARY_FOLDERS | {"pipelines"}
ALLOWED |= dict.fromkeys(("", "tools", "experiments"), SCRIPTS)
ALLOWED |= dict.fromkeys(("benchmarks", "launch"), SCRIPTS | {""})


def imports(path: Path, module_level_only: bool = False) -> Iterator[Path]:
    """Files that a file imports; function-level and TYPE_CHECKING imports are included unless `module_level_only`."""
    tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
    for node in module_level(tree.body) if module_level_only else ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        yield from {MODULES[name] for name in names if name in MODULES and MODULES[name] != path}


def module_level(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements executed on import: those of the module and of its `if`, `try` and `with` blocks."""
    for node in statements:
        yield node
        condition = ast.unparse(node.test) if isinstance(node, ast.If) else ""
        if "TYPE_CHECKING" not in condition and "__main__" not in condition:
            for name in ("body", "orelse"):
                if isinstance(node, ast.If | ast.Try | ast.With):
                    yield from module_level(getattr(node, name, []))


def reachable(start: Path, graph: dict[Path, set[Path]]) -> set[Path]:
    reached, pending = set(), [start]
    while pending:
        path = pending.pop()
        if path not in reached:
            reached.add(path)
            pending += graph[path]
    return reached


def folder(path: Path) -> str:
    """Unit of the folder rules: `common`, `bestrq/model`, `data`, ...; "" for scripts in the root."""
    parts = path.parts[:-1]
    return "/".join(parts[:2] if parts[:1] in (("bestrq",), ("data",)) else parts[:1])


GRAPH = {path: set(imports(path)) for path in FILES}
# `__init__.py` files are empty, so importing a package imports nothing else.
INITS = {path for path in FILES if path.name == "__init__.py"}


def test_init_files_are_empty() -> None:
    assert [str(path) for path in INITS if len(ast.parse((REPOSITORY / path).read_text()).body) > 1] == []


def test_no_file_is_in_an_import_cycle() -> None:
    """Imports within functions and under TYPE_CHECKING count, since they only hide a cycle."""
    cycles = {path: [other for other in GRAPH[path] if path in reachable(other, GRAPH)] for path in FILES}
    assert nonempty(cycles) == {}


def test_a_folder_imports_only_the_folders_allowed() -> None:
    refused = {}
    for path in set(FILES) - INITS:
        allowed = ALLOWED[folder(path)] | {folder(path)}
        refused[path] = [other for other in GRAPH[path] - INITS if folder(other) not in allowed]
    assert nonempty(refused) == {}


def nonempty(edges: dict[Path, list[Path]]) -> dict[str, list[str]]:
    """Nonempty lists, as strings that pytest prints in full."""
    return {str(path): sorted(map(str, others)) for path, others in edges.items() if others}


def test_the_allowed_imports_of_folders_form_no_cycle() -> None:
    done: set[str] = set()
    while pending := {name for name in ALLOWED if name not in done and ALLOWED[name] <= done}:
        done |= pending
    assert done == set(ALLOWED)


def test_pretraining_reaches_few_files() -> None:
    """Bounds the code that a reader of pretrain.py has to read."""
    graph = {path: set(imports(path, module_level_only=True)) - INITS for path in FILES}
    reached = reachable(Path("pretrain.py"), graph)
    lines = sum(len((REPOSITORY / path).read_text(encoding="utf-8").splitlines()) for path in reached)
    assert len(reached) <= 45 and lines <= 7000, (len(reached), lines, sorted(map(str, reached)))
