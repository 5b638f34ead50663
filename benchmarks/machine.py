"""Precision of this machine's hardware, and the line of JSON that ends a benchmark."""

import json
from collections.abc import Mapping
from typing import Any, Literal

import torch

from bestrq.training.precision import DTYPES, has_bfloat16, processor_name


def hardware_precision() -> Literal["float32", "bfloat16"]:
    """Return bfloat16 if the CPU multiplies it in hardware, otherwise float32, since emulation takes hours."""
    return "bfloat16" if has_bfloat16(torch.device("cpu")) else "float32"


def hardware_dtype() -> torch.dtype:
    """Dtype of `hardware_precision`."""
    return DTYPES[hardware_precision()]


def hardware_autocast() -> torch.autocast:
    """CPU autocast in `hardware_precision`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=hardware_precision() == "bfloat16")


def print_figures(figures: Mapping[str, Any], precision: str, threads: int | None = None) -> None:
    """Print one line of JSON: the figures, the processor, the precision and the number of threads.

    Args:
        precision: precision of the measured arithmetic.
        threads: threads per process; torch's current number by default.
    """
    machine = {"processor": processor_name(), "precision": precision, "threads": threads or torch.get_num_threads()}
    print(json.dumps({**figures, **machine}))
