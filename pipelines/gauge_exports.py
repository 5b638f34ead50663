"""Outputs of exports for the gauge: codes of teachers, CTC log-probabilities."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bestrq.pretraining import gauge_targets, objective
from bestrq.pretraining.layer_features import pad_rows, similar_lengths
from bestrq.training.export_reading import read_export
from bestrq.training.process import World
from common.segments import Segments
from data.format.dataset import Dataset
from data.tokenizer import Tokenizer
from pipelines.gauge_sample import Piece, read_log_mel
from pipelines.recogniser import check_features, ctc_outputs, load_recogniser, mel_reader
from pipelines.run_weights import read_trained
from pipelines.teacher import read_teacher

Reader = Callable[[Piece], Tensor]


def rows_of_pieces(
    read: Reader, pieces: Sequence[Piece], multiple: int
) -> Iterator[tuple[list[int], tuple[Tensor, Segments]]]:
    """Batches of pieces of similar length: their numbers, and features `[R, F, M]` with segments, a piece a row.

    Args:
        read: normalised features of a piece.
        multiple: of the length of a row, in mel frames.
    """
    for numbers in similar_lengths([piece.stop - piece.start for piece in pieces]):
        yield numbers, pad_rows([read(pieces[number]) for number in numbers], multiple)


def run_pieces(
    outputs: Callable[[Tensor, Segments], Tensor], read: Reader, pieces: Sequence[Piece], multiple: int
) -> tuple[list[Tensor], int]:
    """Outputs of a model for every piece, and mel frames per output frame.

    Args:
        outputs: log-mel `[R, F, M]` and segments -> `[R, T, ...]`.
        read, multiple: see `rows_of_pieces`.

    Returns:
        `[frames // stride, ...]` per piece: an incomplete last frame is dropped, as in pretraining.
    """
    results = [torch.empty(0)] * len(pieces)
    stride = 1
    for numbers, (rows, segments) in rows_of_pieces(read, pieces, multiple):
        with torch.inference_mode():
            values = outputs(rows, segments)
        stride = rows.shape[1] // values.shape[1]
        for number, row in zip(numbers, values, strict=True):
            results[number] = row[: (pieces[number].stop - pieces[number].start) // stride].clone()
    return results, stride


class TeacherCodes:
    """Codes of pretraining's teacher of a target of kind 'clusters' or 'ctc_labels'.

    The features have the normalisation of the export. Raises UserError: damaged export, other features than the
    dataset, no such layer, no CTC head.
    """

    def __init__(self, settings: gauge_targets.TargetSettings, dataset: Dataset) -> None:
        settings = settings.with_defaults()
        assert settings.kind in ("clusters", "ctc_labels")
        targets = objective.TargetSettings(
            source="teacher",
            export=settings.export,
            kind=settings.kind,
            blank=settings.blank,
            layer=settings.layer,
            clusters=settings.clusters or 1,
            seed=settings.seed or 0,
        )
        export = read_trained(settings.export)
        normalisation = export.config.get("normalisation", "recording")
        self.teacher = read_teacher(targets, export, dataset, normalisation, World())
        self.seed = targets.seed
        self.read: Reader = lambda piece: read_log_mel(dataset, piece, normalisation)

    def estimate(self, pieces: Sequence[Piece]) -> None:
        """Estimate the clusters, if the codes are clusters. Raises UserError with too few frames."""
        if self.teacher.head is None:
            rows = [batch for _, batch in rows_of_pieces(self.read, pieces, self._multiple)]
            self.teacher.estimate(rows, self.seed, World())

    def __call__(self, pieces: Sequence[Piece]) -> tuple[list[Tensor], int]:
        """Codes of every piece, int64 `[T]`, and mel frames per code."""
        return run_pieces(
            lambda rows, segments: self.teacher(rows, segments).view(len(rows), -1), self.read, pieces, self._multiple
        )

    @property
    def _multiple(self) -> int:
        return self.teacher.encoder.settings.row_multiple


class CTCOutputs:
    """CTC log-probabilities of an export of finetune_ctc.py, or of finetune_rnnt.py with a CTC head.

    Raises UserError: not a recogniser, no CTC head, other features than the dataset.
    """

    def __init__(self, folder: str, dataset: Dataset) -> None:
        self.recogniser = load_recogniser(read_export(folder))
        check_features(self.recogniser.features, dataset)
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
