"""The past and the frame itself."""

from dataclasses import dataclass

from bestrq.model.attention.masks import Frames


@dataclass(frozen=True)
class CausalMask:
    """All keys up to the query."""

    def __call__(self, query: Frames) -> tuple[Frames, Frames]:
        return query * 0, query + 1

    @property
    def reach(self) -> tuple[None, int]:
        return None, 0


if __name__ == "__main__":
    from bestrq.model.attention.masks.draw import main

    main(CausalMask)
