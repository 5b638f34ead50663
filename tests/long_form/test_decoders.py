"""Decoders over whole recordings: independence of batches, excluded intervals, times, settings."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bestrq.decoding.hypotheses import Hypothesis
from bestrq.decoding.tokens import TimedTokens, greedy_ctc
from bestrq.long_form.decoders import (
    BeamCTC,
    Decoder,
    DecoderSettings,
    GreedyCTC,
    TransducerDecoder,
    decode_recordings,
    read_fusion,
)
from bestrq.long_form.inference import InferenceSettings, RecordingSource
from bestrq.model.settings import EncoderSettings
from bestrq.recognition.ctc import CTCModel
from bestrq.recognition.transducer import TransducerModel, TransducerSettings
from common.config import parse
from common.errors import UserError

MELS, STRIDE, RATE = 8, 4, 100.0
ENCODER = EncoderSettings(
    num_mels=MELS, dim=16, num_layers=1, num_heads=2, feedforward_dim=24, kernel_size=5, subsampling_channels=4
)
KINDS = ("ctc", "ctc beam", "greedy", "beam", "hybrid's ctc")


def make_decoder(kind: str) -> Decoder:
    """Decoder with a random model, scaled so that it emits labels."""
    torch.manual_seed(1)
    model: CTCModel | TransducerModel
    if kind in ("ctc", "ctc beam"):
        model = CTCModel(ENCODER, 6).eval()
        model.head.weight.data *= 4
        return GreedyCTC(model.log_probs) if kind == "ctc" else BeamCTC(model.log_probs, DecoderSettings(beam=3))
    settings = TransducerSettings(prediction_dim=12, joint_dim=10, ctc_weight=1.0)
    model = TransducerModel(ENCODER, settings, 6).eval()
    model.joint.output.weight.data *= 4
    assert model.ctc_head is not None
    model.ctc_head.weight.data *= 4
    if kind == "hybrid's ctc":
        return GreedyCTC(model.ctc_log_probs)
    return TransducerDecoder(model, DecoderSettings(beam=3 if kind == "beam" else 1, max_symbols=2))


def source(num_frames: int, *excluded: tuple[float, float]) -> RecordingSource:
    log_mel = torch.randn(num_frames, MELS, generator=torch.Generator().manual_seed(num_frames))
    return RecordingSource(num_frames, lambda start, stop: log_mel[start:stop], excluded)


def decode(
    decoder: Decoder, sources: list[RecordingSource], context: float = 0.0, batch: float = 1e6
) -> list[TimedTokens]:
    settings = InferenceSettings(context_seconds=context, batch_seconds=batch)
    result = dict(decode_recordings(decoder, sources, settings, STRIDE, RATE))
    return [result[index] for index in range(len(sources))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", [0.0, 0.8])
def test_recordings_come_out_the_same_in_any_batch(kind: str, context: float) -> None:
    decoder = make_decoder(kind)
    sources = [source(n) for n in (1, 30, 41, 200, 203)]
    alone = decode(decoder, sources, context, batch=0.01)
    for batch in (1e6, 4.0):
        together = decode(decoder, sources, context, batch)
        assert together == alone
        for tokens, expected in zip(together, alone, strict=True):
            assert tokens.confidence == pytest.approx(expected.confidence, abs=1e-4)
            assert len(tokens.confidence) == len(tokens.ids) and all(0 < p <= 1 for p in tokens.confidence)
    assert sum(len(tokens.ids) for tokens in alone) > 20


@pytest.mark.parametrize("kind", KINDS)
def test_excluded_intervals_have_no_tokens_and_times_are_those_of_the_recording(kind: str) -> None:
    """Encoder frame t covers 40 t to 40 t + 40 ms; it is excluded if its centre is."""
    [tokens] = decode(make_decoder(kind), [source(400, (0.0, 0.5), (2.0, 3.01))])
    included = [t for t in range(100) if not (0.04 * t + 0.02 < 0.5 or 2.0 <= 0.04 * t + 0.02 < 3.01)]
    assert set(tokens.first_frame) | set(tokens.last_frame) <= set(included)
    assert tokens.first_frame == sorted(tokens.first_frame) and len(tokens.ids) > 2
    assert kind == "beam" or max(tokens.last_frame) > 75


@pytest.mark.parametrize("kind", ["greedy", "beam"])
def test_a_transducer_search_skips_excluded_frames(kind: str) -> None:
    decoder = make_decoder(kind)
    assert isinstance(decoder, TransducerDecoder)
    outputs, excluded = torch.randn(1, 60, 10), torch.arange(60) % 7 < 2
    [result] = decoder.search([outputs[0]], [excluded])
    [shorter] = decoder.search([outputs[0][~excluded]], [torch.zeros(int((~excluded).sum()), dtype=torch.bool)])
    assert result.ids == shorter.ids and len(result.ids) > 3
    frames: Tensor = (~excluded).nonzero().squeeze(1)
    assert result.first_frame == frames[shorter.first_frame].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fully_excluded_recording_has_no_tokens(kind: str) -> None:
    whole, part = decode(make_decoder(kind), [source(80, (0.0, 9.0)), source(120)])
    assert whole == TimedTokens([], [], []) and part.ids


def test_bad_settings_name_the_field() -> None:
    for argument, expected in (
        ("beam=0", "above 0"),
        ("max_symbols=-1", "above 0"),
        ("ctc_labels=0", "above 0"),
        ("hot_word_weight=0", "above 0"),
        ("hot_word_weight=nan", "above 0"),
        ("hot_word_weight=inf", "give a positive number"),
        ("head=lstm", "auto.*ctc.*rnnt"),
    ):
        name, value = argument.split("=")
        with pytest.raises(UserError, match=f"{name} is '?{value}'?[:,] .*{expected}"):
            parse(DecoderSettings, [f"--{argument}"])
    with pytest.raises(UserError, match=r"decoder.label_bonus is given, but decoder.beam is 1 .*: give a beam"):
        DecoderSettings(label_bonus=0.5)
    with pytest.raises(UserError, match="decoder.ctc_min_log_prob is 1"):
        DecoderSettings(ctc_min_log_prob=1.0)
    with pytest.raises(UserError, match=r"decoder.hot_words is given, but decoder.beam is 1"):
        DecoderSettings(hot_words="names.txt")


def test_a_greedy_ctc_confidence_is_the_mean_probability_of_the_frames_of_a_label() -> None:
    probabilities = torch.tensor([[0.2, 0.8, 0], [0.4, 0.6, 0], [0.7, 0.2, 0.1], [0.1, 0.9, 0], [0.1, 0.2, 0.7]])
    [tokens] = greedy_ctc(probabilities[None].log(), torch.tensor([5]))
    assert tokens.ids == [1, 1, 2] and tokens.confidence == pytest.approx([0.7, 0.9, 0.7])
    decoder = make_decoder("ctc")
    kept = decoder.reduce(probabilities.log())
    excluded = torch.tensor([False, True, False, False, False])
    [tokens] = decoder.search([kept], [excluded])
    assert tokens.ids == [1, 1, 2] and tokens.confidence == pytest.approx([0.8, 0.9, 0.7])


@pytest.mark.parametrize("kind", ["ctc beam", "beam"])
def test_a_rescorer_selects_the_transcript(kind: str) -> None:
    decoder = make_decoder(kind)
    assert isinstance(decoder, BeamCTC | TransducerDecoder)
    rescored: list[list[list[int]]] = []

    def prefer_last(hypotheses: Sequence[Hypothesis]) -> list[float]:
        rescored.append([hypothesis.tokens.ids for hypothesis in hypotheses])
        return list(range(len(hypotheses)))

    [first] = decode(decoder, [source(200)])
    [result] = decode(replace(decoder, rescorer=prefer_last), [source(200)])
    assert (
        [rescored[0][0], rescored[0][-1]] == [first.ids, result.ids]
        and len(rescored[0]) == 3
        and first.ids != result.ids
    )
    assert replace(decoder, rescorer=prefer_last).description.endswith("no language model, rescored")


def test_fusion_is_read_from_the_files_in_the_settings(tmp_path: Path) -> None:
    pieces = ["<blank>", "a", "b"]
    (tmp_path / "hot.txt").write_text("ab\na\t3\n")
    files = ["\\data\\", "ngram 1=4", "\\1-grams:", "-1 <s>", "-1 </s>", "-0.5 a", "-0.25 b", "\\end\\", ""]
    (tmp_path / "lm.arpa").write_text("\n".join(files))
    settings = DecoderSettings(
        beam=4, hot_words=str(tmp_path / "hot.txt"), hot_word_weight=2.0, language_model=str(tmp_path / "lm.arpa"),
        language_model_weight=0.5, label_bonus=0.125,
    )  # fmt: skip
    fusion = read_fusion(settings, pieces, lambda text: [pieces.index(piece) for piece in text])
    assert fusion is not None
    ten = math.log(10)
    assert fusion.label_scores(((), 0), [0, 1, 2]) == pytest.approx([0, 0.125 - 0.25 * ten + 3, 0.125 - 0.125 * ten])
    assert "language model of weight 0.5, hot words" in BeamCTC(lambda *_: torch.zeros(0), settings, fusion).description
    assert read_fusion(DecoderSettings(beam=4), pieces, list) is None
