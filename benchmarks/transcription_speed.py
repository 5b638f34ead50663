"""Waveform to text: our transcription against transformers' pipeline for speech recognition, with chunking.

    python -m benchmarks.transcription_speed                  # needs requirements-benchmarks.txt
    python -m benchmarks.transcription_speed --peers wav2vec2 parakeet
    python -m benchmarks.transcription_speed --layers 1 --seconds 12 --recordings 2 --repeats 1      # a trial

The peers are models that the pipeline runs with CTC, with random weights and the size of one of our presets: width,
layers, heads, feed-forward width, kernel, SiLU.

    wav2vec2    Wav2Vec2ConformerForCTC with rotary positions, against base-120m. Its convolutions turn the waveform
                into 50 frames per second; base-120m has 25, from log-mel
    parakeet    ParakeetForCTC (FastConformer), against fast-115m: both have 12.5 frames per second, from log-mel. The
                number of samples per frame is set here, since the pipeline does not derive it

All systems use the same recordings, float32 at 16 kHz in memory, the same windows (--chunk-seconds, of which --overlap
is dropped, half at each end), the same number of windows per batch (--batch), the same precision, and greedy CTC with
characters. Ours computes log-mel, its statistics over the recording, and text with word times; the pipeline only text.
The texts of the random models are meaningless. The systems alternate; the fastest pass of each counts. The last line is
JSON:

    ratio_to_transformers           audio-seconds per second, ours / the peer; the smallest over --peers
    ratio_to_PEER                   per peer
    PEER_ours, PEER_transformers    audio-seconds per second
"""

import argparse
import contextlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.encoder_peers import require
from benchmarks.machine import print_figures
from bestrq.long_form.decoders import GreedyCTC, decode_recordings
from bestrq.long_form.inference import InferenceSettings, RecordingSource
from bestrq.model.conformer import EncoderSettings
from bestrq.model.presets import PRESETS
from bestrq.recognition.ctc import CTCModel
from bestrq.transcripts.words import timed_words
from data.features import FeatureSettings
from data.format.dataset import mean_and_std, normalisation_scale, normalise_into
from data.log_mel import LogMel
from data.tokenizer import CharTokenizer

RATE = 16000
CHARACTERS = list(" abcdefghijklmnopqrstuvwxyz'")
PRESET_OF = {"wav2vec2": "base-120m", "parakeet": "fast-115m"}


@dataclass(frozen=True)
class System:
    """Recogniser under test."""

    model: nn.Module
    transcribe: Callable[[Sequence[np.ndarray]], list[str]]
    """float32 [samples] each -> texts"""


def make_recordings(count: int, seconds: float) -> list[np.ndarray]:
    """Noise with the loudness changes of speech, of `seconds` each, varied by up to a quarter."""
    generator = np.random.default_rng(0)
    recordings = []
    for share in np.linspace(0.75, 1.25, count) if count > 1 else [1.0]:
        samples = round(share * seconds * RATE)
        loudness = np.repeat(generator.uniform(0.01, 0.2, size=samples // 3200 + 1), 3200)[:samples]
        recordings.append((loudness * generator.normal(size=samples)).astype(np.float32))
    return recordings


def make_ours(encoder: EncoderSettings, args: argparse.Namespace) -> System:
    """Our recogniser: the computation of transcribe.py, on audio in memory."""
    tokenizer, features = CharTokenizer(CHARACTERS), FeatureSettings()
    model = CTCModel(encoder, tokenizer.vocab_size).eval().to(args.device)
    log_mel_of, decoder = LogMel(features), GreedyCTC(model.log_probs)
    settings = InferenceSettings(
        context_seconds=args.chunk_seconds,
        overlap=args.overlap,
        batch_seconds=args.batch * args.chunk_seconds,
        precision=args.precision,
    )

    def read_mel(log_mel: np.ndarray, mean: Tensor, inverse_std: Tensor, start: int, stop: int) -> Tensor:
        out = torch.empty(stop - start, features.num_mels)
        normalise_into(out, log_mel[start:stop], mean, inverse_std)
        return out

    def transcribe(recordings: Sequence[np.ndarray]) -> list[str]:
        sources = []
        for waveform in recordings:
            log_mel = log_mel_of(waveform).to(torch.float16).numpy()
            own_mean, std = map(torch.from_numpy, mean_and_std(log_mel))
            mean, inverse_std = normalisation_scale(own_mean, std)
            sources.append(RecordingSource(len(log_mel), partial(read_mel, log_mel, mean, inverse_std)))
        texts = [""] * len(sources)
        rate = features.frames_per_second
        for index, tokens in decode_recordings(decoder, sources, settings, encoder.stride, rate, args.device):
            timed_words(tokens, tokenizer.pieces, encoder.stride / rate)
            texts[index] = tokenizer.decode(tokens.ids)
        return texts

    return System(model, transcribe)


def make_peer(name: str, encoder: EncoderSettings, args: argparse.Namespace) -> System:
    """Model and pipeline of transformers."""
    transformers = require("transformers")
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocab.json"
        names = ["<pad>", "<unk>", *("|" if c == " " else c for c in CHARACTERS)]
        vocabulary.write_text(json.dumps({token: number for number, token in enumerate(names)}), encoding="utf-8")
        tokenizer = transformers.Wav2Vec2CTCTokenizer(str(vocabulary), bos_token=None, eos_token=None)
    make = {"wav2vec2": make_wav2vec2, "parakeet": make_parakeet}[name]
    model, extractor = make(transformers, encoder, len(names))
    recognise = transformers.pipeline(
        "automatic-speech-recognition", model=model.eval(), tokenizer=tokenizer, feature_extractor=extractor,
        device=args.device, chunk_length_s=args.chunk_seconds, stride_length_s=args.chunk_seconds * args.overlap / 2,
        batch_size=args.batch,
    )  # fmt: skip

    def transcribe(recordings: Sequence[np.ndarray]) -> list[str]:
        # New dictionaries, because the pipeline removes their fields.
        inputs = [{"raw": waveform, "sampling_rate": RATE} for waveform in recordings]
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bfloat16"):
            return [result["text"] for result in recognise(inputs)]

    return System(model, transcribe)


def make_wav2vec2(transformers: Any, encoder: EncoderSettings, vocab_size: int) -> tuple[Any, Any]:
    """Wav2Vec2-Conformer CTC and its feature extractor, with the front end of the released models."""
    config = transformers.Wav2Vec2ConformerConfig(
        vocab_size=vocab_size,
        pad_token_id=0,
        hidden_size=encoder.dim,
        num_hidden_layers=encoder.num_layers,
        num_attention_heads=encoder.num_heads,
        intermediate_size=encoder.feedforward_dim,
        hidden_act="silu",
        position_embeddings_type="rotary",
        conv_depthwise_kernel_size=encoder.kernel_size,
        feat_extract_norm="layer",
        conv_bias=True,
    )
    extractor = transformers.Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=RATE, padding_value=0.0, do_normalize=True, return_attention_mask=True
    )
    return transformers.Wav2Vec2ConformerForCTC(config), extractor


def make_parakeet(transformers: Any, encoder: EncoderSettings, vocab_size: int) -> tuple[Any, Any]:
    """Parakeet CTC and its feature extractor."""
    shape = transformers.ParakeetEncoderConfig(
        hidden_size=encoder.dim,
        num_hidden_layers=encoder.num_layers,
        num_attention_heads=encoder.num_heads,
        intermediate_size=encoder.feedforward_dim,
        conv_kernel_size=encoder.kernel_size,
        subsampling_factor=encoder.stride,
        num_mel_bins=encoder.num_mels,
    )
    config = transformers.ParakeetCTCConfig(vocab_size=vocab_size, pad_token_id=0, encoder_config=shape.to_dict())
    extractor = transformers.ParakeetFeatureExtractor(feature_size=encoder.num_mels, sampling_rate=RATE)
    config.inputs_to_logits_ratio = extractor.hop_length * encoder.stride
    return transformers.ParakeetForCTC(config), extractor


def one_pass(system: System, recordings: Sequence[np.ndarray], device: str) -> float:
    """Seconds from waveforms to texts."""
    wait = torch.cuda.synchronize if device == "cuda" else contextlib.nullcontext
    wait()
    start = time.perf_counter()
    texts = system.transcribe(recordings)
    wait()
    seconds = time.perf_counter() - start
    if len(texts) != len(recordings):
        raise RuntimeError(f"{len(texts)} texts of {len(recordings)} recordings: the timings are invalid")
    return seconds


def compare(name: str, recordings: Sequence[np.ndarray], args: argparse.Namespace) -> dict[str, float]:
    """Measure audio-seconds per second of ours and of the peer, alternating."""
    preset = PRESETS[PRESET_OF[name]]
    encoder = replace(preset, num_layers=args.layers or preset.num_layers)
    systems = {"ours": make_ours(encoder, args), "transformers": make_peer(name, encoder, args)}
    for label, system in systems.items():
        count = sum(parameter.numel() for parameter in system.model.parameters())
        print(f"{name}, {label}: {count / 1e6:.1f} M parameters")
        one_pass(system, recordings[:1], args.device)
    audio = sum(map(len, recordings)) / RATE
    times: dict[str, list[float]] = {label: [] for label in systems}
    for repeat in range(args.repeats):
        for label, system in systems.items():
            times[label].append(one_pass(system, recordings, args.device))
        print(
            f"  {repeat}: RTFx " + ", ".join(f"{label} {audio / t[-1]:.2f}" for label, t in times.items()),
            flush=True,
        )
    speeds = {label: audio / min(seconds) for label, seconds in times.items()}
    own = {f"{name}_{label}": speed for label, speed in speeds.items()}
    return {**own, f"ratio_to_{name}": speeds["ours"] / speeds["transformers"]}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=list(PRESET_OF), default=["wav2vec2"])
    parser.add_argument("--recordings", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60.0, help="mean length of a recording")
    parser.add_argument("--chunk-seconds", type=float, default=20.0, help="length of a window")
    parser.add_argument("--overlap", type=float, default=0.25, help="share of a window that is dropped")
    parser.add_argument("--batch", type=int, default=4, help="windows in a batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=0, help="number of layers; 0 for those of the presets")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="bfloat16 by autocast")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    recordings = make_recordings(args.recordings, args.seconds)
    result: dict[str, float] = {}
    for name in args.peers:
        result |= compare(name, recordings, args)
    result["ratio_to_transformers"] = min(result[f"ratio_to_{name}"] for name in args.peers)
    print_figures({key: round(value, 4) for key, value in result.items()}, args.precision)


if __name__ == "__main__":
    main()
