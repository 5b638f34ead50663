"""Table of the corpora by name."""

from __future__ import annotations

from common.errors import UserError, did_you_mean
from data.corpora import (
    common_voice,
    debian_voices,
    earnings22,
    folder,
    homophones,
    huggingface,
    lhotse,
    librispeech,
    long_context_asr,
    mls,
    synthetic,
    tedlium,
)
from data.corpora.base import Corpus

CORPORA: dict[str, Corpus] = {
    "synthetic": Corpus(
        "speech synthesised by espeak-ng: many voices, seven languages, exact word times; needs no download",
        synthetic.SyntheticSettings,
        synthetic.sources,
    ),
    "homophones": Corpus(
        "speech synthesised by espeak-ng with homophones whose spelling depends on the topic of the recording",
        homophones.HomophoneSettings,
        homophones.sources,
    ),
    "fillets": Corpus(
        "real speech: the actors of the game Fish Fillets, Czech and Dutch, 3.3 h; downloaded from Debian packages",
        debian_voices.FilletsSettings,
        debian_voices.sources,
    ),
    "debian_voices": Corpus(
        "real speech: Fish Fillets and descriptions from Tux Paint in 13 languages, 6.3 h; from Debian packages",
        debian_voices.DebianVoicesSettings,
        debian_voices.sources,
    ),
    "folder": Corpus(
        "your own audio: a folder of audio files and .txt transcripts, or a NeMo manifest (JSON lines)",
        folder.FolderSettings,
        folder.sources,
    ),
    "mls": Corpus(
        "Multilingual LibriSpeech: read books in eight languages, 51,000 h; from the Hugging Face hub or OpenSLR 94",
        mls.MlsSettings,
        mls.sources,
        free=("cache", "cache_gb"),
    ),
    "librispeech": Corpus(
        "LibriSpeech: read English books, 960 h; OpenSLR 12's folders, with word times from the LibriSpeech alignments",
        librispeech.LibriSpeechSettings,
        librispeech.sources,
    ),
    "common_voice": Corpus(
        "Mozilla Common Voice: sentences read by volunteers in many languages; an unpacked release",
        common_voice.CommonVoiceSettings,
        common_voice.sources,
    ),
    "huggingface": Corpus(
        "any audio dataset of the Hugging Face hub, or a local copy of one, by its name and columns",
        huggingface.HuggingFaceSettings,
        huggingface.sources,
        free=("cache", "cache_gb"),
    ),
    "tedlium": Corpus(
        "TED-LIUM 1, 2 and 3: English talks, 118 to 452 h; whole talks or utterances, from the unpacked release",
        tedlium.TedliumSettings,
        tedlium.sources,
    ),
    "earnings22": Corpus(
        "Earnings-22: the 6 + 6 earnings calls of the usual dev and test lists, 11 h; from the published repository",
        earnings22.Earnings22Settings,
        earnings22.sources,
    ),
    "earnings22-full": Corpus(
        "Earnings-22: all 125 calls as one test set, 119 h; error rates are not comparable with those of earnings22",
        earnings22.Earnings22FullSettings,
        earnings22.sources_full,
    ),
    "long_context_asr": Corpus(
        "the layout of long-context-asr (Spotify podcasts): stored spectrograms or audio, with word times from Google",
        long_context_asr.LongContextAsrSettings,
        long_context_asr.sources,
        features=long_context_asr.features,
    ),
    "lhotse": Corpus(
        "your own lhotse manifests: cuts, or recordings with supervisions, word alignments included",
        lhotse.LhotseSettings,
        lhotse.sources,
    ),
}


def find_corpus(name: str) -> Corpus:
    """Corpus by name. Raises UserError with the nearest name for an unknown one."""
    if name not in CORPORA:
        known = list(CORPORA)
        raise UserError(f"unknown corpus {name!r}, expected one of {', '.join(known)}.{did_you_mean(name, known)}")
    return CORPORA[name]
