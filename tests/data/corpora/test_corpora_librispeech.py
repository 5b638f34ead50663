"""LibriSpeech: OpenSLR's tree, word times from both forms of the alignments, clear errors."""

from pathlib import Path

import pytest
from corpora_speech import FEATURES, damaged, encoded, likeness, put, speech
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data.corpora.librispeech import LibriSpeechSettings, sources
from data.corpora.registry import find_corpus
from data.recording import Recording

SPEAKERS = """\
; Some pipe(|) separated metadata about all LibriVox readers, whose work was used
; in the corpus.
;
;ID  |SEX| SUBSET           |MINUTES| NAME
19   | F | train-clean-100  | 25.19 | Kara Shallenberg
84   | F | dev-clean        | 8.02  | Christie Nowak
1089 | M | test-clean       | 8.05  | Peter | Bobbe
"""
TEXTS = {
    "train-clean-100/19/198/19-198": ["NORTHANGER ABBEY", "THIS LITTLE WORK WAS FINISHED"],
    "dev-clean/84/121123/84-121123": ["GO DO YOU HEAR"],
    "test-clean/1089/134686/1089-134686": ["HE HOPED THERE WOULD BE STEW"],
}
ALIGNMENT = '19-198-0000 ",NORTHANGER,ABBEY," "0.100,0.600,1.000,1.120"\n19-198-0001 "THIS,LITTLE,,WORK,WAS,FINISHED," '
ALIGNMENT += '"0.2,0.4,0.5,0.6,0.7,1.1,1.4"\n'
TEXTGRID = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 1.2
tiers? <exists>
size = 1
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 1.2
        intervals: size = 5
        intervals [1]:
            xmin = 0
            xmax = 0.1
            text = ""
        intervals [2]:
            xmin = 0.1
            xmax = 0.3
            text = "go"
        intervals [3]:
            xmin = 0.3
            xmax = 0.5
            text = "do"
        intervals [4]:
            xmin = 0.5
            xmax = 0.7
            text = "<unk>"
        intervals [5]:
            xmin = 0.7
            xmax = 1.0
            text = "hear"
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "LibriSpeech"
    put(folder / "SPEAKERS.TXT", SPEAKERS)
    put(folder / "README.TXT", "LibriSpeech")
    for chapter, texts in TEXTS.items():
        for number, text in enumerate(texts):
            put(folder / f"{chapter}-{number:04d}.flac", encoded(text, "flac"))
        lines = "".join(f"{Path(chapter).name}-{number:04d} {text}\n" for number, text in enumerate(texts))
        put(folder / f"{chapter}.trans.txt", lines)
    return folder


@pytest.fixture
def alignments(tmp_path: Path) -> Path:
    """One chapter as .alignment.txt, one as TextGrid, none for the third."""
    folder = tmp_path / "LibriSpeech-alignments" / "LibriSpeech"
    put(folder / "train-clean-100/19/198/19-198.alignment.txt", ALIGNMENT)
    put(folder / "dev-clean/84/121123/84-121123-0000.TextGrid", TEXTGRID)
    return folder.parent


def recordings(**fields: object) -> dict[str, Recording]:
    found = sources(LibriSpeechSettings(**fields))  # type: ignore[arg-type]
    assert [source.id for source in found] == sorted(source.id for source in found)
    return {source.id: source.load(FEATURES).recording for source in found}


def test_the_tree_gives_texts_speakers_and_the_subsets_splits(tree: Path) -> None:
    found = recordings(folder=str(tree.parent))  # the parent of LibriSpeech is accepted too
    assert {id: (r.split, r.speaker, r.text, r.language, r.words) for id, r in found.items()} == {
        "19-198-0000": ("train", "19", "NORTHANGER ABBEY", "en", None),
        "19-198-0001": ("train", "19", "THIS LITTLE WORK WAS FINISHED", "en", None),
        "84-121123-0000": ("dev", "84", "GO DO YOU HEAR", "en", None),
        "1089-134686-0000": ("test", "1089", "HE HOPED THERE WOULD BE STEW", "en", None),
    }
    assert set(recordings(folder=str(tree), subsets=["dev-clean"])) == {"84-121123-0000"}


def test_recordings_decode_to_the_audio_of_their_files(tree: Path) -> None:
    source = next(s for s in sources(LibriSpeechSettings(str(tree))) if s.id == "84-121123-0000")
    assert likeness(source.load(FEATURES).waveform.numpy(), speech("GO DO YOU HEAR")) > 0.999


def test_recordings_are_selected_by_gender_in_speakers_txt(tree: Path) -> None:
    assert set(recordings(folder=str(tree), subsets=["test-clean"], gender="M")) == {"1089-134686-0000"}
    with pytest.raises(UserError, match="dev-clean has no recordings with these settings"):
        sources(LibriSpeechSettings(str(tree), subsets=["dev-clean"], gender="M"))
    put(tree / "SPEAKERS.TXT", SPEAKERS + "99 | X | dev-clean | 1 | Nobody\n")
    with pytest.raises(UserError, match=r"SPEAKERS.TXT:8: expected id \| F or M"):
        sources(LibriSpeechSettings(str(tree), gender="F"))


def test_both_forms_of_the_alignments_give_the_transcripts_words_their_times(tree: Path, alignments: Path) -> None:
    found = recordings(folder=str(tree), alignments=str(alignments))
    words = {id: None if r.words is None else [tuple(w[:3]) for w in r.words] for id, r in found.items()}
    assert words["19-198-0000"] == [("NORTHANGER", 0.1, 0.6), ("ABBEY", 0.6, 1.0)]
    assert words["19-198-0001"] == [
        ("THIS", 0.0, 0.2),
        ("LITTLE", 0.2, 0.4),
        ("WORK", 0.5, 0.6),
        ("WAS", 0.6, 0.7),
        ("FINISHED", 0.7, 1.1),
    ]
    # Lower case and <unk> of the aligner are replaced by the transcript.
    assert words["84-121123-0000"] == [("GO", 0.1, 0.3), ("DO", 0.3, 0.5), ("YOU", 0.5, 0.7), ("HEAR", 0.7, 1.0)]
    assert words["1089-134686-0000"] is None  # some recordings could not be aligned


def test_an_alignment_of_other_words_only_drops_the_times(tree: Path, alignments: Path) -> None:
    path = alignments / "LibriSpeech/train-clean-100/19/198/19-198.alignment.txt"
    put(path, ALIGNMENT.replace("NORTHANGER,ABBEY", "NORTHANGER,").replace("0.600,1.000", "0.6,1.0"))
    textgrid = alignments / "LibriSpeech/dev-clean/84/121123/84-121123-0000.TextGrid"
    put(textgrid, TEXTGRID.replace('text = "hear"', 'text = ""'))
    listed = sources(LibriSpeechSettings(str(tree), alignments=str(alignments)))
    found = {source.id: source.load(FEATURES) for source in listed}
    assert len(found) == 4
    assert "19-198.alignment.txt:1: 1 words are aligned, " in found["19-198-0000"].warnings[0]
    assert "84-121123-0000.TextGrid: 3 words are aligned" in found["84-121123-0000"].warnings[0]
    assert "do not include this recording" in found["1089-134686-0000"].warnings[0]
    assert found["19-198-0001"].recording.words and not found["19-198-0001"].warnings
    assert all(u.recording.text and (u.recording.words is None) == bool(u.warnings) for u in found.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('19-198-0000 ",A," "0.1,0.2"\n', ":1: 19-198-0000 has 3 words and silences, and 2 times"),
        ('19-198-0000 "A,B" "0.5,0.2"\n', ":1: 19-198-0000: the end of 'B', 0.2 s, is before its start, 0.5 s"),
        ('19-198-0000 "A,B" "0.5,nan"\n', ":1: 'nan' is not a time in seconds"),
        ('19-198-0000 "A" "0.5"\n19-198-0000 "A" "0.5"\n', ":2: 19-198-0000 occurs twice"),
        ('19-198-0000 "A,B" "0.5,0.\n', ':1: expected ID "WORD,WORD" "END,END"'),
        (b"\xff\xfe\n", "do not include this recording"),
        ("x" * (1 << 21), "a line of more than"),
    ],
)
def test_a_damaged_alignment_drops_the_times_of_its_recordings_with_a_warning(
    tree: Path, alignments: Path, content: str | bytes, message: str
) -> None:
    path = put(alignments / "LibriSpeech/train-clean-100/19/198/19-198.alignment.txt", content)
    listed = sources(LibriSpeechSettings(str(tree), alignments=str(alignments)))
    first = next(source for source in listed if source.id == "19-198-0000").load(FEATURES)
    assert (first.recording.text, first.recording.words) == ("NORTHANGER ABBEY", None)
    assert first.warnings[0].startswith("kept without word times: ") and message in first.warnings[0]
    assert path.name in first.warnings[0] or "do not include" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("19-198-0000 NORTHANGER ABBEY\n", r"has no transcript of 19-198-0001.flac"),
        ("19-198-0000 A\n19-198-0000 B\n19-198-0001 C\n", r"19-198.trans.txt:2: 19-198-0000 occurs twice"),
        ("19-198-0000 A\n19-198-0001 B\n19-198-0002 C\n", r"1 audio files are missing: 19-198-0002.flac"),
        ("19-198-0000 A\n19-198-0001\n", r"19-198.trans.txt:2: expected 19-198-NUMBER and the text"),
        ("19-198-0000 A\n20-198-0001 B\n", r"19-198.trans.txt:2: expected 19-198-NUMBER and the text"),
        (b"19-198-0000 A\n19-198-0001 \xe9t\xe9\n", r"19-198.trans.txt:2: not UTF-8"),
    ],
)
def test_errors_of_damaged_transcripts_name_file_and_line(tree: Path, content: str | bytes, message: str) -> None:
    put(tree / "train-clean-100/19/198/19-198.trans.txt", content)
    with pytest.raises(UserError, match=message):
        sources(LibriSpeechSettings(str(tree)))


def test_wrong_folders_are_an_error(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        sources(LibriSpeechSettings(str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="holds no subset such as train-clean-100"):
        sources(LibriSpeechSettings(str(tree / "dev-clean")))
    with pytest.raises(UserError, match="Did you mean 'dev-clean'"):
        sources(LibriSpeechSettings(str(tree), subsets=["dev-cleen"]))
    (tmp_path / "empty" / "dev-clean").mkdir(parents=True)
    with pytest.raises(UserError, match="has no .alignment.txt or .TextGrid of dev-clean"):
        sources(LibriSpeechSettings(str(tree), subsets=["dev-clean"], alignments=str(tmp_path / "empty")))
    assert find_corpus("librispeech").sources is sources


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_files_give_recordings_or_one_error(tree: Path, alignments: Path, data: st.DataObject) -> None:
    aligned = alignments / "LibriSpeech/train-clean-100/19/198/19-198.alignment.txt"
    transcript = tree / "train-clean-100/19/198/19-198.trans.txt"
    originals = {
        aligned: ALIGNMENT.encode(),
        transcript: b"19-198-0000 NORTHANGER ABBEY\n19-198-0001 THIS LITTLE WORK WAS FINISHED\n",
        tree / "SPEAKERS.TXT": SPEAKERS.encode(),
    }
    wrong = data.draw(st.sampled_from(sorted(originals)))
    for path, content in originals.items():
        put(path, data.draw(damaged(content)) if path == wrong else content)
    chosen = LibriSpeechSettings(str(tree), ["train-clean-100"], str(alignments), gender="F")
    try:
        found = sources(chosen)
    except UserError as error:
        assert str(wrong.parent) in str(error) or "with these settings" in str(error) or "alignments" in str(error)
        return
    for source in found:
        words = source.recording.words or []  # type: ignore[attr-defined]
        assert all(0 <= word.start <= word.end for word in words)
