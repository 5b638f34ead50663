"""Every frame of a segment sees all of it: the whole context, as offline recognition wants it."""

from dataclasses import dataclass

from bestrq.model.attention.masks import UNBOUNDED, Frames


@dataclass(frozen=True)
class SegmentMask:
    """All keys of the segment."""

    def __call__(self, query: Frames) -> tuple[Frames, Frames]:
        return query * 0, query * 0 + UNBOUNDED

    @property
    def reach(self) -> tuple[None, None]:
        return None, None


if __name__ == "__main__":
    from bestrq.model.attention.masks.draw import main

    main(SegmentMask)
