"""Names with any spaces and format characters work in corpora, datasets and transcripts; invalid ones are skipped."""

import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import safetensors
from corpora_speech import encoded, put

from bestrq.transcripts.formats import TimedTranscript, ctm_text
from bestrq.transcripts.words import TimedWord
from common.errors import UserError
from data.corpora.base import Unreadable
from data.corpora.folder import FolderSettings, sources
from data.features import FeatureSettings
from data.format.dataset import open_dataset
from data.format.writer import DatasetWriter
from data.names import escaped, name_fault, space_fields
from data.prepare.prepare import main
from data.recording import Recording
from data.shards.derive import stored_recording
from data.shards.select import read_ids
from data.word_times.ctm import read_ctm
from data.word_times.find import find_word_times
from data.word_times.stm import read_stm

# Format characters and spaces (Cf, Zs, Zl, Zp), unassigned and private characters, and separators of file formats.
ODD = [chr(c) for c in range(0x20, 0x3100) if unicodedata.category(chr(c)) in ("Cf", "Zs", "Zl", "Zp")]
ODD += list("\ufeff\ue000\u0378\ufffe\U000e0001\U0001f600\\\"'%&<>|{}[]#;,:=@")
CONTROLS = [chr(c) for c in (*range(1, 32), *range(127, 160))]


@pytest.mark.parametrize("name", ["", " ", "\u3000", *(f"a{c}b" for c in CONTROLS), "a\0", "\ud800", "a\udcff"])
def test_names_refuse_control_characters_and_surrogates_and_are_not_empty(name: str) -> None:
    assert name_fault(name)
    with pytest.raises(UserError, match="recording id .*: give it another name"):
        Recording(name)
    assert name_fault(escaped(f"x{name}")) is None and escaped(name).encode().decode() == escaped(name)


@pytest.mark.parametrize("character", ODD)
def test_a_name_may_contain_any_other_character(character: str) -> None:
    for name in (f"a{character}b", f"{character}a", f"a{character}"):
        assert name_fault(name) is None and Recording(name).id == name and escaped(name) == name


def test_any_valid_name_survives_a_dataset_round_trip(tmp_path: Path) -> None:
    ids = sorted(f"a{c}b" for c in ODD) + ["\u3000edge\u00a0"]
    with DatasetWriter(tmp_path / "d", FeatureSettings()) as writer:
        for number, id in enumerate(ids):
            writer.add(Recording(id, id), np.full((5, 80), number, np.float16))
        writer.finish()
    dataset = open_dataset(tmp_path / "d")
    assert sorted(dataset.id(n) for n in range(len(dataset))) == sorted(ids)
    for number, id in enumerate(ids):
        place = dataset.index.find(id)
        assert place is not None and stored_recording(dataset, place).text == id
        assert dataset.read(place, verify=True)[0, 0] == number
    with safetensors.safe_open(tmp_path / "d/shard-00000.safetensors", "numpy") as shard:
        assert sorted(shard.keys()) == sorted(ids)
    listed = put(tmp_path / "ids.txt", "".join(f"{id}\n" for id in ids if id[0] != "{"))
    assert read_ids(listed) == [id.strip(" ") for id in ids if id[0] != "{"]


def test_a_folder_of_odd_names_is_prepared_and_a_file_with_an_invalid_name_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    audio = encoded("guten tag", "wav", "de")
    good = ["a\u3000b", "c\u00a0d", "soft\u00adhyphen", "zwnj\u200cx", "\u2028line", " space ", "rlm\u200f"]
    bad = ["new\nline", "bell\x07", "nel\u0085", os.fsdecode(b"latin-\xe9")]
    for name in (*good, *bad, "__metadata__"):
        for suffix, content in (("wav", audio), ("txt", b"guten tag")):
            put(folder / f"{name}.{suffix}", content)
    found = sources(FolderSettings(folder=str(folder)))
    assert sorted(source.id for source in found if not isinstance(source, Unreadable)) == sorted(good)
    assert len(found) == len(good) + len(bad) + 1
    out = tmp_path / "out"
    assert main(["folder", f"--folder={folder}", f"--out={out}", "--workers=1"]) == 0
    dataset = open_dataset(out)
    assert sorted(dataset.id(n) for n in range(len(dataset))) == sorted(good)
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [entry["id"] for entry in skipped] == sorted(
        ["__metadata__.wav", "bell\\x07.wav", "latin-\\udce9.wav", "nel\\x85.wav", "new\\nline.wav"]
    )
    assert "U+000A" in str(skipped) and "not UTF-8" in str(skipped)
    assert "skipped 5 recordings" in capsys.readouterr().out
    assert main(["folder", f"--folder={folder}", f"--out={out}", "--workers=1"]) == 0


@pytest.mark.parametrize("space", ["\u00a0", "\u3000", "\u2003", "\u2028", "\u00ad", "\u200c"])
def test_only_ascii_spaces_separate_fields_in_stm_and_ctm(tmp_path: Path, space: str) -> None:
    name = f"talk{space}one"
    (segment,) = read_stm(
        put(tmp_path / "a.stm", f"{name} 1\tan{space}na 0 1.5 <o,f0{space}x> gr\u00fc{space}\u00df  dich\n")
    )
    assert (segment.recording, segment.speaker, segment.end) == (name, f"an{space}na", 1.5)
    assert (segment.label, segment.text) == (f"o,f0{space}x", f"gr\u00fc{space}\u00df  dich")
    said = TimedTranscript(name, 2.0, "hi you", [TimedWord("hi", 0.5, 0.75), TimedWord("you", 1.0, 1.5)])
    other = TimedTranscript("other", 2.0, "no", [TimedWord("no", 0.5, 0.75)])
    path = put(tmp_path / f"{name}.ctm", ctm_text(said) + ctm_text(other))
    assert set(read_ctm(path)) == {name, "other"}
    assert [word.word for word in find_word_times(tmp_path / f"{name}.wav") or ()] == ["hi", "you"]
    assert space_fields(f" a{space}b \t c  d ", 1) == [f"a{space}b", "c  d"] and space_fields(" \t") == []


def test_a_control_character_is_still_damage_to_an_stm(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.stm:1: a control character"):
        read_stm(put(tmp_path / "a.stm", "a 1 s 0 1 x\x07\n"))
