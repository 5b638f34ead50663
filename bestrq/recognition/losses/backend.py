"""Choice between Triton's kernels and the reference for the losses that sum over all alignments."""

import importlib.util
import os
import shutil
import sysconfig
import warnings
from functools import cache
from pathlib import Path

from torch import Tensor


def use_kernels(log_probs: Tensor) -> bool:
    """True if the sum over alignments of these log-probabilities is computed by `kernels.py` or `ctc_kernels.py`: on a
    GPU, if Triton can build them."""
    if not log_probs.is_cuda:
        return False
    missing = missing_for_triton()
    if missing is not None:
        _warn_slow(missing)
    return missing is None


def missing_for_triton() -> str | None:
    """Package or file that Triton needs to start a kernel and does not find on this machine; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    if "CC" not in os.environ and not shutil.which("gcc") and not shutil.which("clang"):
        return "a C compiler (gcc, or the variable CC)"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if header.is_file() else f"{header} (package python3-dev)"


@cache
def _warn_slow(missing: str) -> None:
    warnings.warn(
        f"Triton cannot build the losses of recognition for the GPU without {missing}: a slower loss of many small "
        f"operations is used; install it and start again",
        stacklevel=3,
    )
