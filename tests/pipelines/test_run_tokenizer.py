"""The tokenizer of a run is written whole or not at all."""

from pathlib import Path

import pytest

from bestrq.training.process import World
from bestrq.training.run_folder import RunFolder
from data.tokenizer import BPETokenizer, Tokenizer
from pipelines.finetuning import FinetuneSettings, run_tokenizer

TEXTS = ["a bad cab", "a cab", "dad"]


def tokenizer(folder: Path, kind: str = "char", texts: list[str] = TEXTS) -> Tokenizer:
    settings = FinetuneSettings(tokenizer=kind, vocab_size=12)  # type: ignore[arg-type]
    return run_tokenizer(RunFolder(folder), texts, settings, World())


@pytest.mark.parametrize("content", [{}, {"tokenizer.model": "half"}], ids=["empty", "only the model"])
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_an_unfinished_tokenizer_is_made_again(kind: str, content: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    for name, text in content.items():
        (tmp_path / "tokenizer" / name).write_text(text)
    made = tokenizer(tmp_path, kind)
    assert made.decode(made.encode("bad cab")) == "bad cab"
    again = tokenizer(tmp_path, kind, ["other text"])
    assert again.pieces == made.pieces, "read, not trained again"


def test_a_kill_while_it_is_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = BPETokenizer.save

    def killed(self: BPETokenizer, folder: Path) -> None:
        save(self, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(BPETokenizer, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        tokenizer(tmp_path, "bpe")
    assert list(tmp_path.iterdir()) == []
