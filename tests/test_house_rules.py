"""What holds for every source file: no code from data files, rooms that do not know each other, readable sizes."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(REPOSITORY.glob("*.py"))
MODULES = sorted(
    path for room in ("bestrq", "data", "common", "benchmarks") for path in (REPOSITORY / room).rglob("*.py")
)


# Other people's tensors, which come as torch.save wrote them: checked first, then read by torch's restricted loader.
TENSOR_READER = REPOSITORY / "data/corpora/long_context_asr.py"


def files_with(pattern: str, files: list[Path]) -> list[str]:
    found = re.compile(pattern, re.MULTILINE)
    return [str(path.relative_to(REPOSITORY)) for path in files if found.search(path.read_text())]


# A pickle, and an archive with crafted paths, run or overwrite what their author likes. The linter bans some of these.
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
def test_no_source_runs_code_out_of_a_data_file(pattern: str) -> None:
    files = [path for path in [*SCRIPTS, *MODULES] if path != TENSOR_READER or "torch" not in pattern]
    assert files_with(pattern, files) == []


def test_the_one_module_that_reads_tensors_of_others_does_so_restricted() -> None:
    text = TENSOR_READER.read_text()
    assert re.findall(r"torch\.(?:load|save)\(.*", text) == re.findall(r"torch\.load\(.*weights_only=True.*", text)
    assert len(re.findall(r"torch\.load\(", text)) == 1


@pytest.mark.parametrize(
    ("room", "stranger"),
    [("bestrq", "data"), ("data", "bestrq"), ("common", "bestrq"), ("common", "data"), ("common", "benchmarks")],
)
def test_the_libraries_do_not_import_each_other_and_common_imports_none(room: str, stranger: str) -> None:
    assert files_with(rf"^\s*(from|import) {stranger}\b", sorted((REPOSITORY / room).rglob("*.py"))) == []


def test_libraries_do_not_import_scripts() -> None:
    scripts = "|".join(path.stem for path in SCRIPTS)
    assert files_with(rf"^\s*(from|import) ({scripts})\b", MODULES) == []


def test_the_model_knows_nothing_of_training() -> None:
    model = sorted((REPOSITORY / "bestrq/model").rglob("*.py"))
    assert files_with(r"^\s*(from|import) bestrq\.(training|pretraining|recognition)\b", model) == []


@pytest.mark.parametrize(("files", "budget"), [(SCRIPTS, 400), (MODULES, 400)], ids=["scripts", "modules"])
def test_files_stay_short_enough_to_read(files: list[Path], budget: int) -> None:
    lengths = {str(path.relative_to(REPOSITORY)): len(path.read_text().splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > budget} == {}


def test_code_is_ascii() -> None:
    """Word lists and transcripts aside: what looks alike must be alike."""
    sources = [path for path in [*SCRIPTS, *MODULES] if "corpora" not in path.parts]
    assert [str(path.relative_to(REPOSITORY)) for path in sources if not path.read_text().isascii()] == []


def calls_in_the_locales_encoding(source: str) -> Iterator[int]:
    """Lines of calls that read or write text, or start a program, without saying `encoding=`."""
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        given = {word.arg: word.value for word in call.keywords}
        function = call.func
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        strings = [value.value for value in [*call.args, *given.values()] if isinstance(value, ast.Constant)]
        modes = [one for one in strings if isinstance(one, str) and re.fullmatch(r"[rwaxbt+]+", one)]
        opens = name in ("open", "fdopen") and getattr(getattr(function, "value", None), "id", "") != "os"
        texts = opens and (bool(modes) or isinstance(function, ast.Name)) and not any("b" in mode for mode in modes)
        texts |= name in ("NamedTemporaryFile", "TemporaryFile") and any("b" not in mode for mode in modes)
        texts |= name == "write_text" or (name == "read_text" and not call.args)
        texts |= any(getattr(given.get(word), "value", False) for word in ("text", "universal_newlines"))
        if texts and "encoding" not in given:
            yield call.lineno


def test_text_is_never_in_the_encoding_of_the_locale() -> None:
    """Input and output are UTF-8 on every machine."""
    found = ["open(p)", "open(p, 'a')", "p.open('w')", "p.read_text()", "p.write_text(t)", "run(c, text=True)"]
    assert [list(calls_in_the_locales_encoding(line)) for line in found] == [[1]] * len(found)
    for path in [*SCRIPTS, *MODULES, *(REPOSITORY / "launch").glob("*.py")]:
        source = path.read_text(encoding="utf-8")
        assert (str(path), list(calls_in_the_locales_encoding(source))) == (str(path), [])
