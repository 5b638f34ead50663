"""Decoders over whole recordings: batches change nothing, what is excluded is not heard, times are the recording's."""

import pytest
import torch
from torch import Tensor

from bestrq.config import ConfigError
from bestrq.model.settings import EncoderSettings
from bestrq.recognition.ctc import CTCModel
from bestrq.recognition.decoders import Decoder, DecoderSettings, GreedyCTC, TransducerDecoder, decode_recordings
from bestrq.recognition.decoding import TimedTokens
from bestrq.recognition.inference import InferenceSettings, Source
from bestrq.recognition.transducer import TransducerModel, TransducerSettings

MELS, STRIDE, RATE = 8, 4, 100.0
ENCODER = EncoderSettings(
    num_mels=MELS, dim=16, num_layers=1, num_heads=2, feedforward_dim=24, kernel_size=5, subsampling_channels=4
)
KINDS = ("ctc", "greedy", "beam", "hybrid's ctc")


def make_decoder(kind: str) -> Decoder:
    """Of a random model whose blank is rare enough that there is something to find."""
    torch.manual_seed(1)
    model: CTCModel | TransducerModel
    if kind == "ctc":
        model = CTCModel(ENCODER, 6).eval()
        model.head.weight.data *= 4
        return GreedyCTC(model.log_probs)
    settings = TransducerSettings(prediction_dim=12, joint_dim=10, ctc_weight=1.0)
    model = TransducerModel(ENCODER, settings, 6).eval()
    model.joint.output.weight.data *= 4
    assert model.ctc_head is not None
    model.ctc_head.weight.data *= 4
    if kind == "hybrid's ctc":
        return GreedyCTC(model.ctc_log_probs)
    return TransducerDecoder(model, DecoderSettings(beam=3 if kind == "beam" else 1, max_symbols=2))


def source(num_frames: int, *excluded: tuple[float, float]) -> Source:
    log_mel = torch.randn(num_frames, MELS, generator=torch.Generator().manual_seed(num_frames))
    return Source(num_frames, lambda start, stop: log_mel[start:stop], excluded)


def decode(decoder: Decoder, sources: list[Source], context: float = 0.0, batch: float = 1e6) -> list[TimedTokens]:
    how = InferenceSettings(context_seconds=context, batch_seconds=batch)
    found = dict(decode_recordings(decoder, sources, how, STRIDE, RATE))
    return [found[index] for index in range(len(sources))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", [0.0, 0.8])
def test_recordings_come_out_the_same_in_any_batch(kind: str, context: float) -> None:
    decoder = make_decoder(kind)
    sources = [source(n) for n in (1, 30, 41, 200, 203)]
    alone = decode(decoder, sources, context, batch=0.01)
    assert decode(decoder, sources, context) == alone == decode(decoder, sources, context, batch=4.0)
    assert sum(len(tokens.ids) for tokens in alone) > 20


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_found_in_excluded_stretches_and_times_are_those_of_the_recording(kind: str) -> None:
    """Encoder frame t stands for 40 t to 40 t + 40 ms; its middle decides."""
    [tokens] = decode(make_decoder(kind), [source(400, (0.0, 0.5), (2.0, 3.01))])
    heard = [t for t in range(100) if not (0.04 * t + 0.02 < 0.5 or 2.0 <= 0.04 * t + 0.02 < 3.01)]
    assert set(tokens.first_frame) | set(tokens.last_frame) <= set(heard)
    assert tokens.first_frame == sorted(tokens.first_frame) and len(tokens.ids) > 2
    assert kind == "beam" or max(tokens.last_frame) > 75


@pytest.mark.parametrize("kind", ["greedy", "beam"])
def test_a_transducer_searches_what_is_heard_as_if_the_rest_were_not_there(kind: str) -> None:
    decoder = make_decoder(kind)
    assert isinstance(decoder, TransducerDecoder)
    outputs, excluded = torch.randn(1, 60, 10), torch.arange(60) % 7 < 2
    [found] = decoder.search([outputs[0]], [excluded])
    [shorter] = decoder.search([outputs[0][~excluded]], [torch.zeros(int((~excluded).sum()), dtype=torch.bool)])
    assert found.ids == shorter.ids and len(found.ids) > 3
    frames: Tensor = (~excluded).nonzero().squeeze(1)
    assert found.first_frame == frames[shorter.first_frame].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_recording_that_is_excluded_as_a_whole_has_no_tokens(kind: str) -> None:
    whole, part = decode(make_decoder(kind), [source(80, (0.0, 9.0)), source(120)])
    assert whole == TimedTokens([], [], []) and part.ids


def test_bad_settings_name_the_field() -> None:
    with pytest.raises(ConfigError, match="decoder.beam is 0"):
        DecoderSettings(beam=0)
    with pytest.raises(ConfigError, match="decoder.max_symbols is -1"):
        DecoderSettings(max_symbols=-1)
    with pytest.raises(ConfigError, match=r"decoder.beam is 4, but decoder.head is 'ctc'"):
        DecoderSettings(head="ctc", beam=4)
    with pytest.raises(ConfigError, match=r"decoder.language_model is lm.arpa, but decoder.head is 'ctc'"):
        DecoderSettings(head="ctc", language_model="lm.arpa")
    with pytest.raises(ConfigError, match=r"decoder.label_bonus is given, but decoder.beam is 1 .*: give a beam"):
        DecoderSettings(label_bonus=0.5)
