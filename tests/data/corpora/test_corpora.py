"""Synthetic, Debian and folder corpora: exact word times, disjoint splits, reproducible audio, clear errors."""

import json
import random
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from common.config import parse as parse_settings
from common.errors import UserError
from data.corpora.audio_files import FileSource
from data.corpora.debian_packages import package_folders
from data.corpora.debian_voices import DebianVoicesSettings, FilletsSettings, parse_dialogs
from data.corpora.debian_voices import sources as debian_sources
from data.corpora.espeak import Synthesizer, UnspeakableWord
from data.corpora.folder import FolderSettings
from data.corpora.folder import sources as folder_sources
from data.corpora.grammar import LANGUAGES, load_grammar
from data.corpora.numbers import spell_number
from data.corpora.registry import CORPORA, find_corpus
from data.corpora.synthetic import VARIANTS, SyntheticSettings, sentence_split
from data.corpora.synthetic import sources as synthetic_sources
from data.features import FeatureSettings
from data.prepare.prepare import parse
from data.recording import Recording
from tests.paths import REPOSITORY

FEATURES = FeatureSettings()
ALL_LANGUAGES = list(LANGUAGES)


def write_audio(path: Path, seconds: float = 0.5, rate: int = 16000, seed: int = 0) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * rate)).astype(np.float32)
    soundfile.write(path, samples, rate)
    return samples


def write_lines(path: Path, *entries: dict | str) -> Path:
    path.write_text("".join(f"{e if isinstance(e, str) else json.dumps(e)}\n" for e in entries))
    return path


# --- synthetic


def test_word_times_match_the_audio() -> None:
    """A word that starts and ends with a fricative, between words without one, matches its times."""
    words = "mama sauce mama mama sauce mama".split()
    with Synthesizer("en-us", words_per_minute=140) as voice:
        audio, times = voice.speak(words)
        rate = voice.sample_rate

    def brightness(start: float, end: float) -> float:
        piece = audio[int(start * rate) : int(end * rate)]
        power = np.abs(np.fft.rfft(piece)) ** 2
        return float(power[np.fft.rfftfreq(len(piece), 1 / rate) > 4000].sum() / power.sum())

    hissing = [(start, end) for word, (start, end) in zip(words, times, strict=True) if word == "sauce"]
    assert len(hissing) == 2
    for start, end in hissing:
        assert brightness(start - 0.02, start) < 0.1 and brightness(start, start + 0.02) > 0.5
        assert brightness(end - 0.02, end) > 0.5 and brightness(end, end + 0.02) < 0.1


def test_the_last_word_ends_before_the_silence_after_it() -> None:
    with Synthesizer("de+f2") as voice:
        audio, times = voice.speak(["das", "haus"])
    start, end = (int(second * voice.sample_rate) for second in times[-1])
    assert len(audio) - end > 0.02 * voice.sample_rate
    assert np.abs(audio[end:]).max() < 0.05 * np.abs(audio[start:end]).max()
    assert np.abs(audio[end - 200 : end]).max() > 0.01 * np.abs(audio[start:end]).max()


@pytest.mark.parametrize("language", ALL_LANGUAGES)
def test_every_word_of_the_lists_can_be_synthesised_as_one_word(language: str) -> None:
    grammar = load_grammar(language)
    spoken = [entry for name in set(grammar.lists) - {"onset", "nucleus", "coda"} for entry in grammar.lists[name]]
    words = {word for entry in spoken for word in entry.split() if word not in ("{", "}") and "{" not in word}
    words |= {word for n in range(1000) for word in spell_number(n, language).split()}
    assert len(words) > 350
    with Synthesizer("en-us" if language == "en" else language) as voice:
        assert all(voice.phonemes(word) for word in words)


def test_an_unknown_voice_leaves_no_state_for_later_voices() -> None:
    def speak() -> bytes:
        with Synthesizer("en-us", seed=3) as voice:
            return voice.speak(["hello", "world"])[0].tobytes()

    before = speak()
    with pytest.raises(RuntimeError, match="no voice"), Synthesizer("xx-unknown"):
        pytest.fail("an unknown voice started")
    assert [speak() for _ in range(3)] == [before] * 3


def test_a_word_of_another_language_is_refused() -> None:
    with Synthesizer("fr") as voice, pytest.raises(UnspeakableWord, match="plugline"):
        voice.phonemes("plugline")


@pytest.mark.parametrize(
    ("language", "n", "spelled"),
    [
        ("en", 245, "two hundred forty five"),
        ("de", 721, "siebenhunderteinundzwanzig"),
        ("fr", 80, "quatre vingts"),
        ("fr", 571, "cinq cent soixante et onze"),
        ("fr", 99, "quatre vingt dix neuf"),
        ("es", 100, "cien"),
        ("es", 555, "quinientos cincuenta y cinco"),
        ("it", 128, "centoventotto"),
        ("it", 33, "trentatré"),
        ("nl", 122, "honderdtweeëntwintig"),
        ("nl", 21, "eenentwintig"),
        ("cs", 245, "dvě stě čtyřicet pět"),
    ],
)
def test_numbers_are_spelled_as_in_the_language(language: str, n: int, spelled: str) -> None:
    assert spell_number(n, language) == spelled


@pytest.mark.parametrize("language", ALL_LANGUAGES)
def test_all_numbers_have_different_words(language: str) -> None:
    assert len({spell_number(n, language) for n in range(1000)}) == 1000


@pytest.mark.parametrize("language", ALL_LANGUAGES)
def test_sentences_are_too_many_to_memorise(language: str) -> None:
    rng, grammar = random.Random(0), load_grammar(language)
    sentences = [grammar.sentence(rng) for _ in range(2000)]
    assert len({" ".join(sentence) for sentence in sentences}) > 1900
    assert len({word for sentence in sentences for word in sentence}) > 1100
    assert not any("{" in word for sentence in sentences for word in sentence)


def test_a_recording_is_a_pure_function_of_its_source() -> None:
    """espeak keeps state between utterances; the order of the recordings must not matter."""
    first, second, third = synthetic_sources(
        SyntheticSettings(train_hours=0.02, train_long_share=0, test_long_recordings=0)
    )[:3]
    alone = first.load(FEATURES)
    for other in (second, third):
        other.load(FEATURES)
    again = first.load(FEATURES)
    assert torch.equal(alone.waveform, again.waveform) and alone.recording == again.recording
    assert not torch.equal(alone.waveform, replace(first, seed=1).load(FEATURES).waveform)


def test_short_utterances_last_2_to_15_seconds_and_hours_are_kept() -> None:
    settings = SyntheticSettings(train_hours=0.08, train_long_share=0, dev_utterances=2, test_utterances=3)
    listed = [source for source in synthetic_sources(settings) if not source.seconds]
    loaded = [source.load(FEATURES) for source in listed]
    seconds = [len(utterance.waveform) / FEATURES.sample_rate for utterance in loaded]
    assert all(2 <= s <= 15 for s in seconds)
    assert sum(s for s, source in zip(seconds, listed, strict=True) if source.split == "train") == pytest.approx(
        0.08 * 3600, rel=0.2
    )
    for utterance, s in zip(loaded, seconds, strict=True):
        words = utterance.recording.words
        assert words and utterance.recording.text == " ".join(word.word for word in words)
        edges = [edge for word in words for edge in (word.start, word.end)]
        assert edges == sorted(edges) and edges[0] >= 0.1 and edges[-1] <= s


def test_splits_share_neither_voices_nor_sentences() -> None:
    assert sum(map(len, VARIANTS.values())) == len(set().union(*VARIANTS.values())) >= 24
    settings = SyntheticSettings(train_hours=0.04, train_long_share=0, dev_utterances=8, test_utterances=8)
    recordings = [source.load(FEATURES).recording for source in synthetic_sources(settings) if not source.seconds]
    assert {recording.split for recording in recordings} == {"train", "dev", "test"}
    for recording in recordings:
        assert recording.speaker.split("-", 1)[1] in VARIANTS[recording.split]
        assert recording.speaker.startswith(recording.language)
    # A sentence is in one split for all voices, and each split has its share of them.
    rng, grammar = random.Random(1), load_grammar("en")
    owners = [sentence_split(" ".join(grammar.sentence(rng))) for _ in range(3000)]
    assert 0.04 < owners.count("test") / 3000 < 0.08 and 0.04 < owners.count("dev") / 3000 < 0.08


def test_test_sentences_do_not_occur_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    spoken: dict[str, set[str]] = {"train": set(), "dev": set(), "test": set()}
    speak = Synthesizer.speak
    current = ""

    def note(self: Synthesizer, words: list[str]) -> tuple:
        spoken[current].add(" ".join(words))
        return speak(self, words)

    monkeypatch.setattr(Synthesizer, "speak", note)
    for source in synthetic_sources(
        SyntheticSettings(languages=["en"], train_hours=0.03, dev_utterances=8, test_utterances=8)
    ):
        if not source.seconds:
            current = source.split
            source.load(FEATURES)
    assert min(map(len, spoken.values())) > 10
    for split, sentences in spoken.items():
        assert {sentence_split(sentence) for sentence in sentences} == {split}


def test_a_long_recording_reaches_its_length_with_recurring_topics() -> None:
    settings = SyntheticSettings(languages=["es"], train_hours=0, test_utterances=0, dev_utterances=0, long_minutes=6)
    source = synthetic_sources(settings)[0]
    utterance = source.load(FEATURES)
    assert 360 <= len(utterance.waveform) / FEATURES.sample_rate < 380
    words = utterance.recording.words
    assert words is not None

    def between(start: float, end: float) -> set[str]:
        return {word for word, s, *_ in words if start <= s < end and len(word) > 4}

    # The topic of the first minute recurs after three minutes, that of the second minute does not.
    first, second, fourth = between(0, 60), between(60, 120), between(180, 240)
    assert len(first & fourth) > 1.5 * len(second & fourth)


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("languages", "[xx]", "languages is 'xx'"),
        ("languages", "[]", "languages is empty"),
        ("train_hours", "-1.0", "train_hours is -1.0"),
        ("train_long_share", "1.5", "train_long_share is 1.5"),
        ("long_minutes", "0.0", "long_minutes is 0.0"),
        ("dev_utterances", "-1", "dev_utterances is -1"),
    ],
)
def test_synthetic_settings_name_the_field_and_the_value(field: str, value: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_settings(SyntheticSettings, [f"--{field}={value}"])


def test_an_unknown_corpus_gets_the_nearest_name() -> None:
    assert {"synthetic", "fillets", "folder", "mls", "tedlium", "earnings22", "earnings22-full"} <= set(CORPORA)
    with pytest.raises(UserError, match="'debian_voice'.*Did you mean 'debian_voices'"):
        find_corpus("debian_voice")


# --- Debian's voices


def test_lua_dialogs_are_parsed_with_escapes_and_comments() -> None:
    script = r"""
        dialogId("a-1", "font_small", "He said \"hi\".")
        dialogStr("Rekl: \"ahoj\" \\ \
        konec (hned), \196\141")
        -- dialogId("no", "font_big", "x") dialogStr("comment")
        --[[ dialogId("no2", "font_big", "x")
        dialogStr("long comment") ]]
        dialogId('b', 'font_big', 'not translated')
        dialogId("c", "font_big", "it's (odd)")   dialogStr("To je -- ono")
        function f(x) return planDialog("d", 3) end
    """
    assert parse_dialogs(script) == {
        "a-1": ("font_small", 'Rekl: "ahoj" \\ \n        konec (hned), č'),
        "c": ("font_big", "To je -- ono"),
    }


@pytest.fixture
def debian_tree(tmp_path: Path) -> Path:
    """Small copy of the layout of the packages: two levels of Fish Fillets, one stamp of Tux Paint."""
    game, texts = tmp_path / "usr/share/games/fillets-ng", {}
    for level in ("city", "share/borejokes"):
        for number in range(20):
            # Every phrase occurs twice, with different case and punctuation.
            texts[f"{level[0]}{number}"] = f"Věta číslo {number // 2}" + ("." if number % 2 else "!")
            write_audio(game / "sound" / level / "cs" / f"{level[0]}{number}.ogg", 0.1)
    write_audio(game / "sound/city/cs/untold.ogg", 0.1)
    for number in range(12):
        write_audio(game / f"sound/city/nl/c{number}.ogg", 0.1)
    write_audio(game / "sound/cellar/cs/c3.ogg", 0.1)  # a level without a script, which uses audio of the city
    for name, prefix in (("city/dialogs", "c"), ("share/bore_dialogs", "s")):
        lua = game / f"script/{name}_cs.lua"
        lua.parent.mkdir(parents=True, exist_ok=True)
        level_texts = {id: text for id, text in texts.items() if id.startswith(prefix)}
        lua.write_text("".join(f'dialogId("{i}", "font_big", "x")\ndialogStr("{t}")\n' for i, t in level_texts.items()))
    dutch = "".join(f'dialogId("c{n}", "font_small", "x")\ndialogStr("Hallo {n}.")\n' for n in range(12))
    (game / "script/city/dialogs_nl.lua").write_text(dutch)
    stamps = tmp_path / "usr/share/tuxpaint/stamps/animals"
    for language in ("fr", "be"):
        write_audio(stamps / f"cat_desc_{language}.ogg", 0.1)
    (stamps / "cat.txt").write_text("A cat.\nbe.utf8=Kot.\nfr.utf8=Un chat.\n")
    return tmp_path


def test_ogg_files_get_text_and_speaker_from_the_scripts(debian_tree: Path) -> None:
    found = {source.id: source.recording for source in debian_sources(DebianVoicesSettings(folder=str(debian_tree)))}
    assert len(found) == 56
    city = found["fillets-cs/city/c3"]
    assert (city.text, city.language, city.speaker) == ("Věta číslo 1.", "cs", "fillets-cs-big")
    assert found["fillets-cs/share/borejokes/s4"].text == "Věta číslo 2!"
    assert found["fillets-cs/cellar/c3"].text == "Věta číslo 1."
    assert found["fillets-cs/city/untold"].text is None
    assert found["fillets-nl/city/c0"].speaker == "fillets-nl-small"
    assert found["tuxpaint-fr/animals/cat"].text == "Un chat."
    assert found["tuxpaint-be/animals/cat"].text is None  # the text may differ from the audio
    only = debian_sources(FilletsSettings(folder=str(debian_tree), parts=["fillets-nl"]))
    assert sorted(source.id for source in only) == sorted(f"fillets-nl/city/c{n}" for n in range(12))


def test_all_spellings_of_a_phrase_are_in_one_split(debian_tree: Path) -> None:
    settings = DebianVoicesSettings(folder=str(debian_tree), dev_share=0.3, test_share=0.3)
    recordings = [source.recording for source in debian_sources(settings)]
    held_out = [recording for recording in recordings if recording.language == "cs" and recording.text]
    splits: dict[str, set[str]] = {}
    for recording in held_out:
        splits.setdefault(recording.text.rstrip(".!"), set()).add(recording.split)
    assert all(len(found) == 1 for found in splits.values())
    assert set().union(*splits.values()) == {"train", "dev", "test"}
    assert {recording.split for recording in recordings if recording not in held_out} == {"train"}


def test_debian_folders_without_the_needed_files_are_named(debian_tree: Path, tmp_path: Path) -> None:
    shutil.rmtree(debian_tree / "usr/share/tuxpaint")
    with pytest.raises(UserError, match="tuxpaint: no recordings below"):
        debian_sources(DebianVoicesSettings(folder=str(debian_tree)))
    with pytest.raises(UserError, match="folder is '/no/where'"):
        debian_sources(DebianVoicesSettings(folder="/no/where"))
    (tmp_path / "fillets-ng-data_1_all.deb").write_bytes(b"")
    with pytest.raises(UserError, match="no .deb file of fillets-ng-data-cs: .*apt-get download"):
        debian_sources(FilletsSettings(folder=str(tmp_path), parts=["fillets-cs"], cache=str(tmp_path / "cache")))
    with pytest.raises(UserError, match="parts is 'filets-cs'.*'fillets-cs'"):
        parse_settings(DebianVoicesSettings, ["--parts=[filets-cs]"])


def test_a_failed_download_gives_the_cause_and_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Failing commands replace those of apt: no network is used."""
    for name in ("apt-get", "dpkg-deb"):
        script = tmp_path / name
        script.write_text("#!/bin/sh\necho 'E: no route to the mirror' >&2\nexit 100\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError) as caught:
        package_folders(["fillets-ng-data"], "", tmp_path / "cache")
    for part in ("Debian packages fillets-ng-data", "E: no route to the mirror", "apt-get download", "--folder"):
        assert part in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


# --- folder and manifest


def ids_and_splits(settings: FolderSettings) -> dict[str, str]:
    return {source.id: source.recording.split for source in folder_sources(settings)}  # type: ignore[attr-defined]


def test_a_folder_gives_its_audio_files_with_their_transcripts(tmp_path: Path) -> None:
    expected = write_audio(tmp_path / "train/a/one.flac")
    (tmp_path / "train/a/one.txt").write_text("Hello,\n  world! \n")
    write_audio(tmp_path / "valid/two.wav")
    (tmp_path / "valid/two.txt").write_text("two")
    settings = FolderSettings(folder=str(tmp_path), language="en")
    assert ids_and_splits(settings) == {"train/a/one": "train", "valid/two": "dev"}
    source = folder_sources(settings)[0]
    utterance = source.load(FEATURES)
    assert utterance.recording == Recording("train/a/one", "Hello, world!", language="en", split="train")
    assert torch.allclose(utterance.waveform, torch.from_numpy(expected), atol=1e-4)


def test_hash_shares_keep_a_phrase_in_one_split(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number:02}.wav").write_bytes(b"x")
        (tmp_path / f"{number:02}.txt").write_text(f"phrase {number // 3}")
    splits = ids_and_splits(FolderSettings(folder=str(tmp_path), dev_share=0.3, test_share=0.3))
    assert set(splits.values()) == {"train", "dev", "test"}
    assert all(splits[f"{n:02}"] == splits[f"{n // 3 * 3:02}"] for n in range(60))


def test_missing_transcripts_are_counted_and_named_before_any_work(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.wav").write_bytes(b"x")
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(UserError, match=r"2 of 3 audio files.*a\.wav.*c\.wav.*--text optional"):
        folder_sources(FolderSettings(folder=str(tmp_path)))
    optional = folder_sources(FolderSettings(folder=str(tmp_path), text="optional"))
    assert [source.recording.text for source in optional if isinstance(source, FileSource)] == [None, "b", None]
    none = folder_sources(FolderSettings(folder=str(tmp_path), text="none"))
    assert [source.recording.text for source in none if isinstance(source, FileSource)] == [None] * 3


def test_folder_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no audio file"):
        folder_sources(FolderSettings(folder=str(tmp_path)))
    with pytest.raises(UserError, match="folder is '/no/where'"):
        folder_sources(FolderSettings(folder="/no/where"))
    with pytest.raises(UserError, match="either --folder DIR or --manifest FILE"):
        FolderSettings()
    for name in ("train/a", "b"):
        write_audio(tmp_path / f"{name}.wav")
    with pytest.raises(UserError, match=r"1 audio files.*b\.wav.*--split_by hash"):
        folder_sources(FolderSettings(folder=str(tmp_path), text="none"))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "train/a.txt").write_text("fine")
    with pytest.raises(UserError, match=r"b\.txt is not UTF-8"):
        folder_sources(FolderSettings(folder=str(tmp_path), split_by="hash"))
    b, _ = folder_sources(FolderSettings(folder=str(tmp_path), text="optional", split_by="hash"))
    loaded = b.load(FEATURES)
    assert loaded.recording.text is None and "b.txt is not UTF-8" in loaded.warnings[0]


def test_a_manifest_gives_files_and_segments_of_files(tmp_path: Path) -> None:
    samples = write_audio(tmp_path / "audio/long.wav", 3.0)
    manifest = write_lines(
        tmp_path / "all.json",
        {"audio_filepath": "audio/long.wav", "duration": 3.0, "text": "whole", "speaker": 7, "split": "test"},
        {
            "audio_filepath": str(tmp_path / "audio/long.wav"),
            "offset": 1.5,
            "duration": 0.75,
            "text": "part",
            "lang": "de",
            "split": "valid",
        },
    )
    part, whole = folder_sources(FolderSettings(manifest=str(manifest)))
    loaded = part.load(FEATURES)
    assert (loaded.recording.text, loaded.recording.language, loaded.recording.split) == ("part", "de", "dev")
    assert torch.allclose(loaded.waveform, torch.from_numpy(samples[24000:36000]), atol=1e-4)
    loaded = whole.load(FEATURES)
    assert (loaded.recording.id, loaded.recording.speaker, loaded.recording.split) == ("audio/long", "7", "test")
    assert len(loaded.waveform) == 48000


def test_a_manifest_without_text_or_with_ignored_text(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", 0.1)
    write_audio(tmp_path / "b.wav", 0.1)
    lines = [{"audio_filepath": "a.wav", "text": "x"}, {"audio_filepath": "b.wav"}]
    manifest = str(write_lines(tmp_path / "m.json", *lines))
    for text, expected in (("optional", ["x", None]), ("none", [None, None])):
        found = folder_sources(FolderSettings(manifest=manifest, text=text))
        assert [source.recording.text for source in found if isinstance(source, FileSource)] == expected


def test_a_segment_beyond_the_end_of_the_file_is_unusable(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", 1.0)
    lines = [{"audio_filepath": "a.wav", "offset": start, "duration": 0.9, "text": "x"} for start in (0.5, 2.0)]
    for source in folder_sources(FolderSettings(manifest=str(write_lines(tmp_path / "m.json", *lines)))):
        with pytest.raises(UserError, match=r"a\.wav: ends before the segment's"):
            source.load(FEATURES)


def test_manifests_of_splits_give_the_splits_of_their_recordings(tmp_path: Path) -> None:
    entries = {}
    for split in ("train", "dev", "test"):
        write_audio(tmp_path / f"{split}.wav", 0.1)
        entries[split] = str(write_lines(tmp_path / f"{split}.json", {"audio_filepath": f"{split}.wav", "text": "x"}))
    settings = FolderSettings(manifest=entries["train"], dev_manifest=entries["dev"], test_manifest=entries["test"])
    assert ids_and_splits(settings) == {"train": "train", "dev": "dev", "test": "test"}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"audio_filepath": ', r"m\.json:2: not a JSON object"),
        ("[1]", r"m\.json:2: not a JSON object"),
        ({"text": "x"}, r"m\.json:2: no 'audio_filepath'"),
        ({"audio_filepath": "a.wav"}, r"m\.json:2: no 'text'.*--text none"),
        ({"audio_filepath": "a.wav", "text": 3}, r"m\.json:2: text is 3, expected str"),
        ({"audio_filepath": "a.wav", "text": "x", "offset": -1}, r"m\.json:2: offset is -1"),
        ({"audio_filepath": "a.wav", "text": "x", "offset": 1}, r"m\.json:2: .*needs its duration"),
        ({"audio_filepath": "a.wav", "text": "x", "split": "eval"}, r"m\.json:2: split is 'eval'"),
        ({"audio_filepath": "b.wav", "text": "x"}, r"1 of 2 audio files .*b\.wav.*starts at"),
    ],
)
def test_a_bad_manifest_line_is_named(tmp_path: Path, line: dict | str, complaint: str) -> None:
    write_audio(tmp_path / "a.wav", 0.1)
    manifest = write_lines(tmp_path / "m.json", {"audio_filepath": "a.wav", "duration": 0.1, "text": "fine"}, line)
    with pytest.raises(UserError, match=complaint):
        folder_sources(FolderSettings(manifest=str(manifest)))


PAGES = sorted((REPOSITORY / "docs" / "corpora").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_the_corpus_pages_are_parsed(page: Path) -> None:
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    commands = [
        shlex.split(line, comments=True) for line in re.findall(r"^    python -m data.prepare (.*)", text, re.M)
    ]
    assert commands
    for corpus, *arguments in commands:
        parse(corpus, find_corpus(corpus), arguments)
