"""Commands of README.md run in a small form, or name the test that covers them; links of the docs resolve."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from readme_commands import COMMANDS, Elsewhere, Run, commands_in, readme_commands

from tests.patience import PATIENCE

REPOSITORY = Path(__file__).resolve().parent.parent
SKIPPED = {"README.md", "runs", "datasets", "results"}  # earlier outputs must not be visible to the commands
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository after its installation, which the commands may write to."""
    folder = tmp_path_factory.mktemp("readme")
    for path in REPOSITORY.iterdir():
        if path.name not in SKIPPED and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(sys.prefix)
    write_speech(folder / "speech")
    return folder


def write_speech(folder: Path) -> None:
    """Twelve recordings of two seconds with transcripts, by split."""
    for split, count in (("train", 8), ("dev", 2), ("test", 2)):
        (folder / split).mkdir(parents=True)
        for number in range(count):
            noise = np.random.default_rng(number).normal(scale=0.1, size=32000)
            soundfile.write(folder / split / f"{split}{number}.wav", noise, 16000)
            (folder / split / f"{split}{number}.txt").write_text("ana bela cid\n")


def test_commands_are_found_joined_and_free_of_comments() -> None:
    text = "a\n```bash\n# first\npython a.py \\\n    --b 1  # why\n\n$ c\nc\n```\n```yaml\nd: 1\n```\n"
    text += "```bash\ne '#1'\n```\n"
    assert commands_in(text) == ["python a.py --b 1", "c", "e '#1'"]


def test_the_table_and_the_pages_have_the_same_commands() -> None:
    shown = readme_commands(REPOSITORY)
    assert shown, "the pages show no command"
    assert [command for command in shown if command not in COMMANDS] == [], "add them to tests/readme_commands.py"
    assert [command for command in COMMANDS if command not in shown] == [], "they are on no page"


@pytest.mark.parametrize("command", readme_commands(REPOSITORY))
def test_readme_command_works(command: str, sandbox: Path) -> None:
    entry = COMMANDS.get(command, Run())
    if isinstance(entry, Elsewhere):
        pytest.skip(entry.reason)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", entry.small_form(command)],
        cwd=sandbox, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, f"{entry.small_form(command)}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"


def links(page: Path) -> list[Path]:
    """Targets of the relative links and pictures of a page."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    paths = [target.partition("#")[0] for target in targets if "://" not in target]
    return [(page.parent / path).resolve() for path in paths if path]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_relative_links_resolve(page: Path) -> None:
    assert [str(target) for target in links(page) if not target.exists()] == []


def test_every_page_of_the_docs_is_in_the_index() -> None:
    index = DOCS / "README.md"
    assert set(DOCS.rglob("*.md")) - set(links(index)) == {index}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_source_files_named_in_a_page_exist(page: Path) -> None:
    folders = "bestrq|data|common|pipelines|tools|experiments|launch|configs|benchmarks|tests"
    named = re.findall(rf"`((?:{folders})/[\w/.-]+\.(?:py|sh|sbatch|yaml|json))`", page.read_text(encoding="utf-8"))
    examples = {"configs/NAME.yaml", "data/corpora/NAME.py"}
    assert [name for name in named if name not in examples and not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_imports_in_the_python_examples_resolve(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert [name.name for name in node.names if not hasattr(module, name.name)] == [], node.module
