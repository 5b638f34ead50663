"""Draw an attention mask as text or as a picture.

python -m bestrq.model.attention.draw_mask chunk --size 4 --left_chunks 2 --length 24 --out chunk.png
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor

from bestrq.model.attention.masks import AttentionMask, CausalMask, ChunkMask, SegmentMask, WindowMask
from common.config import parse_sections, run_main
from common.errors import UserError

MASKS: dict[str, type] = {"segment": SegmentMask, "window": WindowMask, "causal": CausalMask, "chunk": ChunkMask}


@dataclass(frozen=True)
class DrawSettings:
    """Size and destination of the drawing."""

    length: PositiveInt = 16
    """frames in the segment"""
    out: str = ""
    """PNG or SVG file; text on the console if empty"""


def dense_mask(mask: AttentionMask, length: int) -> Tensor:
    """Attention mask of one segment, bool `[queries, keys]`."""
    frame = torch.arange(length)
    first, stop = mask(frame)
    return (frame >= first[:, None]) & (frame < stop[:, None])


def as_text(allowed: Tensor) -> str:
    """Text with one line per query: `#` for an allowed key, `.` for a masked key."""
    return "\n".join("".join("#" if key else "." for key in query) for query in allowed.tolist())


def save_picture(allowed: Tensor, title: str, path: Path) -> None:
    """Write a PNG or SVG file, depending on the suffix of the path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="key", ylabel="query", title=title)
    axes.imshow(allowed.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.savefig(path)


def draw(argv: Sequence[str]) -> None:
    """Run the command line: the name of a mask, then its fields and those of `DrawSettings`."""
    if not argv or argv[0] not in MASKS:
        raise UserError(f"mask {argv[0] if argv else ''!r}: give one of {', '.join(MASKS)}, then its options or --help")
    name, *options = argv
    mask, settings = parse_sections(
        {None: [MASKS[name], DrawSettings]},
        options,
        description=__doc__,
        program=f"python -m bestrq.model.attention.draw_mask {name}",
    )
    allowed = dense_mask(mask, settings.length)
    if settings.out:
        save_picture(allowed, repr(mask), Path(settings.out))
    else:
        print(as_text(allowed))


if __name__ == "__main__":
    run_main(lambda: draw(sys.argv[1:]))
