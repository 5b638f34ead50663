"""Rules for every source file: no code from data files, file sizes, encodings, docstring openings."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(REPOSITORY.glob("*.py"))
FOLDERS = ("bestrq", "data", "common", "pipelines", "tools", "experiments", "launch", "benchmarks")
MODULES = sorted(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py"))


# Reads tensors written by torch.save: it checks the archive, and uses the restricted loader of torch.
TENSOR_READER = REPOSITORY / "data/corpora/long_context_asr.py"
COMPARISON = REPOSITORY / "benchmarks/checkpoint_stall.py"  # saves with torch.save too, to compare the time


def files_with(pattern: str, files: list[Path]) -> list[str]:
    """Names of the files in which the pattern occurs."""
    expression = re.compile(pattern, re.MULTILINE)
    return [str(path.relative_to(REPOSITORY)) for path in files if expression.search(path.read_text())]


# Loading a pickle can run arbitrary code, and unpacking an archive can overwrite any file. The linter bans some of
# these patterns as well.
@pytest.mark.parametrize(
    "pattern",
    [
        r"^\s*(import|from) (pickle|dill|cloudpickle|joblib|shelve|marshal|tarfile)\b",
        r"weights_only\s*=\s*False",
        r"allow_pickle\s*=\s*True",
        r"\btorch\.(load|save)\(",
        r"\b(extractall|unpack_archive)\(",
        r"\byaml\.(load|unsafe_load|full_load)\(",
        r"(?<![\w.])(eval|exec)\(",
    ],
)
def test_no_source_runs_code_from_a_data_file(pattern: str) -> None:
    exempt = {TENSOR_READER, COMPARISON} if "torch" in pattern else set()
    assert files_with(pattern, [path for path in [*SCRIPTS, *MODULES] if path not in exempt]) == []


def test_the_reader_of_foreign_tensors_uses_the_restricted_loader() -> None:
    text = TENSOR_READER.read_text()
    assert re.findall(r"torch\.(?:load|save)\(.*", text) == re.findall(r"torch\.load\(.*weights_only=True.*", text)
    assert len(re.findall(r"torch\.load\(", text)) == 1


def test_the_benchmark_of_saves_loads_no_pickle() -> None:
    assert re.findall(r"torch\.(load|save)\(", COMPARISON.read_text()) == ["save"]


@pytest.mark.parametrize("files", [SCRIPTS, MODULES], ids=["scripts", "modules"])
def test_files_have_at_most_400_lines(files: list[Path]) -> None:
    lengths = {str(path.relative_to(REPOSITORY)): len(path.read_text().splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


def test_code_is_ascii() -> None:
    """Different characters can look the same. Word lists and transcripts of corpora are exempt."""
    sources = [path for path in [*SCRIPTS, *MODULES] if "corpora" not in path.parts]
    assert [str(path.relative_to(REPOSITORY)) for path in sources if not path.read_text().isascii()] == []


def calls_in_the_locales_encoding(source: str) -> Iterator[int]:
    """Lines of calls that read or write text, or start a program, without `encoding=`."""
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        keywords = {word.arg: word.value for word in call.keywords}
        function = call.func
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        strings = [value.value for value in [*call.args, *keywords.values()] if isinstance(value, ast.Constant)]
        modes = [value for value in strings if isinstance(value, str) and re.fullmatch(r"[rwaxbt+]+", value)]
        is_open = name in ("open", "fdopen") and getattr(getattr(function, "value", None), "id", "") != "os"
        text = is_open and (bool(modes) or isinstance(function, ast.Name)) and not any("b" in mode for mode in modes)
        text |= name in ("NamedTemporaryFile", "TemporaryFile") and any("b" not in mode for mode in modes)
        text |= name == "write_text" or (name == "read_text" and not call.args)
        text |= any(getattr(keywords.get(word), "value", False) for word in ("text", "universal_newlines"))
        if text and "encoding" not in keywords:
            yield call.lineno


def test_text_is_never_in_the_encoding_of_the_locale() -> None:
    """Input and output are UTF-8 on every machine."""
    calls = ["open(p)", "open(p, 'a')", "p.open('w')", "p.read_text()", "p.write_text(t)", "run(c, text=True)"]
    assert [list(calls_in_the_locales_encoding(line)) for line in calls] == [[1]] * len(calls)
    for path in [*SCRIPTS, *MODULES, *(REPOSITORY / "launch").glob("*.py")]:
        source = path.read_text(encoding="utf-8")
        assert (str(path), list(calls_in_the_locales_encoding(source))) == (str(path), [])


QUESTIONS = re.compile(r"\s*(What|Where|Which|Who|Whom|Whose|When|How|Is|Are|Do|Does)\b")


def docstrings(source: str) -> Iterator[ast.Constant]:
    """Docstrings of a module, its classes, functions, fields and constants: all strings that are statements."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value


def test_no_docstring_opens_with_a_question_word() -> None:
    """The first line is a noun phrase or an imperative (CONTRIBUTING.md)."""
    openings = [
        f"{path.relative_to(REPOSITORY)}:{text.lineno}: {text.value.strip().splitlines()[0]}"
        for path in [*SCRIPTS, *MODULES]
        for text in docstrings(path.read_text(encoding="utf-8"))
        if QUESTIONS.match(text.value)
    ]
    assert openings == []
