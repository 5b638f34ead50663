"""A symmetric window (Beltagy et al., Longformer, arXiv 2004.05150, section 3.1): cost linear in the length."""

from dataclasses import dataclass

from bestrq.model.attention.masks import Frames
from common.errors import UserError


@dataclass(frozen=True)
class WindowMask:
    """The query, and the frames before and behind it."""

    frames: int = 3
    """frames seen to either side"""

    def __post_init__(self) -> None:
        if self.frames < 0:
            raise UserError(f"frames {self.frames} of a window mask: give 0 or more")

    def __call__(self, query: Frames) -> tuple[Frames, Frames]:
        return query - self.frames, query + self.frames + 1

    @property
    def reach(self) -> tuple[int, int]:
        return self.frames, self.frames


if __name__ == "__main__":
    from bestrq.model.attention.masks.draw import main

    main(WindowMask)
