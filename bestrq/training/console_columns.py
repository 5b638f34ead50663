"""Columns of the console line of a run."""

from __future__ import annotations

from collections.abc import Callable


def duration(seconds: float) -> str:
    """`2d03h`, `3h07m`, `4m09s` or `12s`."""
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


COLUMNS: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:8.4f}",
    "dev_loss": lambda value: f"dev loss {value:.4f}",
    "accuracy": lambda value: f"acc {value:6.2%}",
    "dev_accuracy": lambda value: f"acc {value:6.2%}",
    "learning_rate": lambda value: f"lr {value:.2e}",
    "grad_norm": lambda value: f"grad {value:8.3g}",
    "audio_seconds_per_second": "RTFx {:9,.1f}".format,
    "mfu": lambda value: f"MFU {value:6.1%}",
    "memory_gib": lambda value: f"mem {value:5.1f} GiB",
    "data_wait": lambda value: f"wait {value:5.1%}",
    "eta_seconds": lambda value: f"ETA {duration(value):>6}",
}
