"""Layouts of packed rows, for tests of the modules of an encoder."""

import torch

from bestrq.model.layout import RowLayout, StageLayout, make_layout
from bestrq.model.settings import EncoderSettings
from common.segments import Segments


def row_layout(
    starts: list[list[int]], lengths: list[list[int]], frames: int, dtype: torch.dtype = torch.float64,
    backend: str | None = None, **settings: object,
) -> RowLayout:  # fmt: skip
    """Layout of segments, given in mel frames, on the CPU, for an encoder with heads of width 4 and these settings."""
    segments = Segments(torch.tensor(starts), torch.tensor(lengths), frames)
    values = {"dim": 8, "num_heads": 2, "kernel_size": 7, "rotary_theta": 1e4, **settings}
    encoder = EncoderSettings(**values)  # type: ignore[arg-type]
    return make_layout(segments, encoder, training=False, device=torch.device("cpu"), dtype=dtype, backend=backend)


def stage_layout(lengths: list[int], gap: int = 1, rows: int = 1, **settings: object) -> StageLayout:
    """Layout of equal rows with segments of these lengths, each followed by `gap` frames; all in encoder frames."""
    starts = [sum(lengths[:i]) + gap * i for i in range(len(lengths))]
    frames = 4 * (starts[-1] + lengths[-1] + gap)
    layout = row_layout(
        [[4 * start for start in starts]] * rows, [[4 * length for length in lengths]] * rows, frames, **settings
    )  # type: ignore[arg-type]
    return layout.output
