"""Changes of the attention mask for an evaluation, as no weight depends on it; streaming of a changed encoder."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bestrq.long_form.decoders import DecoderSettings, decode_recordings
from bestrq.long_form.inference import InferenceSettings, RecordingSource
from bestrq.model.settings import EncoderSettings
from bestrq.recognition.ctc import CTCModel
from bestrq.training.export import write_export
from bestrq.training.export_reading import Export, read_export
from common.config import from_dict, to_dict
from common.errors import UserError
from common.segments import Segments
from data.features import FeatureSettings
from pipelines.recogniser import EncoderChanges, load_recogniser, make_decoder
from tests.scripts.test_evaluate import make_export


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    folder = tmp_path_factory.mktemp("run")
    return read_export(str(make_export(folder / "export", FeatureSettings())))


def log_probs(export: Export, changes: EncoderChanges) -> Tensor:
    model = load_recogniser(export, changes).model
    assert isinstance(model, CTCModel)
    log_mel = torch.randn(1, 400, 80, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.log_probs(log_mel, Segments(torch.tensor([[0]]), torch.tensor([[400]]), 400))


def test_an_encoder_trained_with_dynamic_chunks_takes_any_mask() -> None:
    trained = EncoderSettings(mask="chunk", dynamic_chunks=True)
    assert EncoderChanges().apply(trained) == trained
    assert EncoderChanges(mask="segment").apply(trained).mask == "segment"
    assert EncoderChanges(mask="window", window=9).apply(trained).window == 9


def test_changes_take_effect_on_the_outputs(export: Export) -> None:
    own = log_probs(export, EncoderChanges())
    assert torch.equal(own, log_probs(export, EncoderChanges(mask="segment")))
    near = log_probs(export, EncoderChanges(mask="window", window=4))
    assert not torch.allclose(near, own, atol=1e-3)
    # This window covers the whole recording.
    torch.testing.assert_close(log_probs(export, EncoderChanges(mask="window", window=100)), own, rtol=0, atol=1e-3)


def test_settings_without_a_change_are_those_of_the_export() -> None:
    own = EncoderSettings(mask="chunk", chunk_size=8, left_chunks=3, rotary_interpolation=2.0)
    assert EncoderChanges().apply(own) == own
    changed = EncoderChanges(left_chunks=-1, rotary_interpolation=4.0).apply(own)
    assert (changed.chunk_size, changed.left_chunks, changed.rotary_interpolation) == (8, -1, 4.0)


def test_changes_come_from_a_command_line() -> None:
    given = from_dict(EncoderChanges, {"mask": "window", "window": 64})
    assert given == EncoderChanges(mask="window", window=64)
    assert from_dict(EncoderChanges, to_dict(EncoderChanges())) == EncoderChanges()


def test_a_change_without_effect_or_with_an_invalid_value_is_named() -> None:
    with pytest.raises(UserError, match="encoder.window = 64 has no effect with mask 'segment'"):
        EncoderChanges(window=64).apply(EncoderSettings())
    with pytest.raises(UserError, match="encoder.left_chunks = 2 has no effect with mask 'window'"):
        EncoderChanges(mask="window", left_chunks=2).apply(EncoderSettings())
    with pytest.raises(UserError, match="window is 0: expected an integer above 0"):
        from_dict(EncoderChanges, {"mask": "window", "window": 0})
    with pytest.raises(UserError, match="encoder.left_chunks: -2 is invalid"):
        EncoderChanges(mask="chunk", left_chunks=-2).apply(EncoderSettings())


def test_a_causal_export_streams_to_the_tokens_of_one_pass(export: Export, tmp_path: Path) -> None:
    causal = {**export.config, "encoder": {**export.config["encoder"], "causal_convolution": True}}
    files = {path.name: path.read_bytes() for path in export.path.iterdir() if "tokenizer" in path.name}
    write_export(tmp_path / "export", export.tensors, causal, "a card", files)
    changes = EncoderChanges(mask="chunk", chunk_size=8, left_chunks=2)
    recogniser = load_recogniser(read_export(str(tmp_path / "export")), changes)
    decoder = make_decoder(recogniser, DecoderSettings(), "export")
    log_mel = torch.randn(700, 80, generator=torch.Generator().manual_seed(0))
    sources = [RecordingSource(n, lambda start, stop: log_mel[start:stop]) for n in (9, 200, 700)]
    streamed, whole = (
        dict(decode_recordings(decoder, sources, InferenceSettings(mode), 4, 100.0))
        for mode in ("streaming", "whole")  # type: ignore[arg-type]
    )
    assert streamed == whole and len(whole[2].ids) > 10
