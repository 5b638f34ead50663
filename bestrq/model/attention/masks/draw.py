"""Draws a mask: `python -m bestrq.model.attention.masks.chunk --size 4 --left_chunks 2 --length 24`."""

from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings
from jsonargparse.typing import PositiveInt
from torch import Tensor

from bestrq.model.attention.masks import dense
from common.config import run_main


def as_text(seen: Tensor) -> str:
    """A line a query: `#` for a key that it sees, `.` for one that it does not."""
    return "\n".join("".join("#" if key else "." for key in query) for query in seen.tolist())


def save_picture(seen: Tensor, title: str, path: Path) -> None:
    """PNG or SVG by the name's ending."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="key", ylabel="query", title=title)
    axes.imshow(seen.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.savefig(path)


def draw(kind: type, argv: list[str] | None = None) -> None:
    """Command line of one mask: its own fields, the length of the segment and where to save a picture."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=f"Draw {kind.__name__}: {kind.__doc__}")
    parser.add_class_arguments(kind, as_group=False)
    parser.add_argument("--length", type=PositiveInt, default=16, help="frames in the segment")
    parser.add_argument("--out", type=str, default="", help="PNG or SVG to write instead of text")
    args = parser.parse_args(argv)
    mask = kind(**{field.name: args[field.name] for field in fields(kind)})
    seen = dense(mask, args.length)
    if args.out:
        save_picture(seen, repr(mask), Path(args.out))
    else:
        print(as_text(seen))


def main(kind: type) -> NoReturn:
    """`draw` as a program."""
    run_main(lambda: draw(kind))
