"""Outputs of exports for the gauge: hidden states of a layer, CTC log-probabilities."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.training.export_reading import Export, read_export, read_trained
from common.config import from_dict
from common.errors import UserError
from common.segments import Segments
from data.features import FeatureSettings, difference
from data.format.dataset import Dataset
from data.tokenizer import Tokenizer
from pipelines.gauge_sample import Piece, batches, read_log_mel
from pipelines.recogniser import ctc_outputs, load_recogniser, mel_reader

Reader = Callable[[Piece], Tensor]


def run_pieces(
    outputs: Callable[[Tensor, Segments], Tensor], read: Reader, pieces: Sequence[Piece], multiple: int
) -> tuple[list[Tensor], int]:
    """Outputs of a model for every piece, and mel frames per output frame.

    Args:
        outputs: log-mel `[R, F, M]` and segments -> `[R, T, K]`.
        read: normalised features of a piece.
        multiple: of the length of a row, in mel frames.

    Returns:
        float32 `[frames // stride, K]` per piece: an incomplete last frame is dropped, as in pretraining.
    """
    results: dict[int, Tensor] = {}
    stride = 1
    for group in batches(pieces):
        mels = [read(pieces[place]) for place in group]
        longest = -(-max(map(len, mels)) // multiple) * multiple
        rows = torch.zeros(len(mels), longest, mels[0].shape[1])
        for row, mel in zip(rows, mels, strict=True):
            row[: len(mel)] = mel
        length = torch.tensor([[len(mel)] for mel in mels])
        with torch.inference_mode():
            values = outputs(rows, Segments(torch.zeros_like(length), length, longest))
        stride = longest // values.shape[1]
        for place, mel, row in zip(group, mels, values, strict=True):
            results[place] = row[: len(mel) // stride].float().clone()
    return [results[place] for place in range(len(pieces))], stride


def check_features(export: Export, dataset: Dataset) -> None:
    """Raise UserError if the dataset has other features than the export."""
    differing = difference(dataset.features, FeatureSettings.from_dict(export.config.get("features", {})))
    if differing:
        raise UserError(f"{export.path} does not fit the dataset (dataset != export): {'; '.join(differing)}")


class LayerOutputs:
    """Hidden states of a layer of an export or checkpoint.

    Args:
        layer: block from 1; 0 is the output of the subsampling, negative numbers count from the last block.

    Raises UserError: damaged export, other features than the dataset, no such layer.
    """

    def __init__(self, folder: str, layer: int, dataset: Dataset) -> None:
        export = read_trained(folder)
        check_features(export, dataset)
        self.encoder = ConformerEncoder(from_dict(EncoderSettings, export.config.get("encoder", {}))).eval()
        weights = {
            name.removeprefix("encoder."): tensor
            for name, tensor in export.tensors.items()
            if name.startswith("encoder.")
        }
        try:
            self.encoder.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{folder}: the encoder does not fit its settings: {error}") from error
        count = len(self.encoder.blocks)
        if not -count <= layer <= count:
            raise UserError(f"layer is {layer}, but the encoder of {folder} has {count} blocks: give 0 to {count}")
        number = layer if layer >= 0 else count + 1 + layer
        self.module = self.encoder.subsampling if number == 0 else self.encoder.blocks[number - 1]
        self.dataset = dataset
        self.normalisation = export.config.get("normalisation", "recording")

    def __call__(self, pieces: Sequence[Piece]) -> tuple[list[Tensor], int]:
        """Hidden states `[T, D]` of every piece, and mel frames per hidden frame."""

        def outputs(rows: Tensor, segments: Segments) -> Tensor:
            kept: list[Tensor] = []
            hook = self.module.register_forward_hook(lambda module, args, output: kept.append(output))
            try:
                self.encoder(rows, self.encoder.layout(segments))
            finally:
                hook.remove()
            return kept[0]

        return run_pieces(
            outputs,
            lambda piece: read_log_mel(self.dataset, piece, self.normalisation),
            pieces,
            self.encoder.settings.row_multiple,
        )


class CTCOutputs:
    """CTC log-probabilities of an export of finetune_ctc.py, or of finetune_rnnt.py with a CTC head.

    Raises UserError: not a recogniser, no CTC head, other features than the dataset.
    """

    def __init__(self, folder: str, dataset: Dataset) -> None:
        export = read_export(folder)
        self.recogniser = load_recogniser(export)
        check_features(export, dataset)
        self.log_probs = ctc_outputs(self.recogniser, folder)
        self.dataset = dataset

    @property
    def tokenizer(self) -> Tokenizer:
        return self.recogniser.tokenizer

    def __call__(self, pieces: Sequence[Piece]) -> tuple[list[Tensor], int]:
        """Log-probabilities `[T, V]` of every piece, and mel frames per output frame."""
        return run_pieces(
            self.log_probs,
            lambda piece: mel_reader(self.recogniser, self.dataset, piece.recording)(piece.start, piece.stop),
            pieces,
            self.recogniser.model.encoder.settings.row_multiple,
        )
