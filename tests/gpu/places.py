"""Places in the repository's own code, for counts and times."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FrameType

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SIMULATION = (
    "simulated_cuda.py",
    "cuda_api.py",
    "cuda_kernels.py",
    "cuda_losses.py",
    "cuda_runtime.py",
    "host_clock.py",
    "places.py",
    "simulated_runs.py",
)
"""files of tests/gpu that are no place"""


def own_frames() -> Iterator[tuple[str, FrameType]]:
    """File (relative to the repository) and frame of the repository's functions being called, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if name := _relative(frame.f_code.co_filename):
            yield name, frame
        frame = frame.f_back


def place() -> str:
    """`file:line function` of the innermost of the repository's functions; `torch` if there is none."""
    for name, frame in own_frames():
        return f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
    return "torch"


@cache
def _relative(name: str) -> str:
    """Path of a source file in the repository; empty for other files and for the simulation."""
    path = Path(name)
    if not path.is_relative_to(REPOSITORY) or {".venv", "site-packages"} & set(path.parts):
        return ""
    return "" if path.parent.name == "gpu" and path.name in SIMULATION else str(path.relative_to(REPOSITORY))
