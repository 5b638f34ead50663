"""Other systems of benchmarks.rnnt_loss: widely used transducer losses, on padded batches.

All except the pruned one take the outputs of the joint network `[B, T, U + 1, V]` of the whole batch, as in normal use.
Packages are imported only if a system is selected. torchaudio is a requirement of this project; warprnnt_numba and
transformers are in requirements-benchmarks.txt; the build of fast_rnnt downloads pybind11 and sets a C++ standard that
is too old for the headers of torch, so `pip install fast_rnnt` needs a network and
`FT_CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Release -DFT_BUILD_TESTS=OFF -DCMAKE_CXX_STANDARD=20"`.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DURATIONS = [0, 1, 2, 3, 4]
"""frames of the duration outputs of TDT"""


@dataclass(frozen=True)
class Problem:
    """Input of a transducer loss. B segments, all of T frames and U labels; J joint width, V vocabulary."""

    encoded: Tensor
    """`[B, T, J]`"""
    predicted: Tensor
    """`[B, U + 1, J]`"""
    labels: Tensor
    """int64 `[B, U]`"""
    output: nn.Linear
    """from the hidden units of a cell to V outputs"""
    acoustic: nn.Linear
    """from a frame to the V outputs of the small joint network, for pruning"""
    language: nn.Linear
    """from a state to the V outputs of the small joint network, for pruning"""
    band: int
    """states per frame, for pruning"""
    durations: nn.Linear
    """from the hidden units of a cell to the outputs of `DURATIONS`"""

    def lengths(self) -> tuple[Tensor, Tensor]:
        """Frames and labels of every segment, int32 `[B]`."""
        full = torch.ones(len(self.labels), dtype=torch.int32)
        return full * self.encoded.shape[1], full * self.labels.shape[1]

    def joint(self) -> Tensor:
        """Outputs of the joint network, float32 `[B, T, U + 1, V]`."""
        return self.output(self.hidden()).float()

    def hidden(self) -> Tensor:
        """Hidden units of all cells, `[B, T, U + 1, J]`."""
        return torch.tanh(self.encoded[:, :, None] + self.predicted[:, None])

    def tdt_arguments(self) -> dict[str, Any]:
        """Arguments of a TDT loss of outputs of the joint network, `[B, T, U + 1, V]` and `[B, T, U + 1, 5]`."""
        hidden, (frames, labels) = self.hidden(), self.lengths()
        return {
            "token_logits": self.output(hidden).float(),
            "duration_logits": self.durations(hidden).float(),
            "targets": self.labels,
            "logit_lengths": frames.long(),
            "target_lengths": labels.long(),
            "blank_token_id": 0,
            "durations": DURATIONS,
            "reduction": "sum",
        }


def torchaudio_loss(problem: Problem) -> Tensor:
    """torchaudio.functional.rnnt_loss with fused log-softmax."""
    import torchaudio

    frames, labels = problem.lengths()
    return torchaudio.functional.rnnt_loss(
        problem.joint(), problem.labels.int(), frames, labels, blank=0, reduction="sum", fused_log_softmax=True
    )


def warprnnt_numba_loss(problem: Problem) -> Tensor:
    """Fallback CPU loss of NeMo, which loops over cells in Python."""
    loss = importlib.import_module("warprnnt_numba.rnnt_loss.rnnt_pytorch").rnnt_loss
    frames, labels = problem.lengths()
    return loss(problem.joint(), problem.labels.int(), frames, labels, blank=0, reduction="sum").sum()


def _boundary(problem: Problem) -> Tensor:
    """int64 `[B, 4]`: first state and frame, last state and frame."""
    frames, labels = (length.long() for length in problem.lengths())
    return torch.stack((frames * 0, frames * 0, labels, frames), dim=1)


def fast_rnnt_loss(problem: Problem) -> Tensor:
    """fast_rnnt.rnnt_loss, over the whole lattice."""
    loss = importlib.import_module("fast_rnnt").rnnt_loss
    return loss(problem.joint(), problem.labels, 0, boundary=_boundary(problem), reduction="sum")


def fast_rnnt_pruned_loss(problem: Problem) -> Tensor:
    """Simple loss of fast_rnnt plus its pruned loss in the resulting bands, as in its documentation."""
    fast = importlib.import_module("fast_rnnt")
    boundary, labels = _boundary(problem), problem.labels
    simple, (by_label, by_blank) = fast.rnnt_loss_simple(
        lm=problem.language(problem.predicted).float(), am=problem.acoustic(problem.encoded).float(), symbols=labels,
        termination_symbol=0, boundary=boundary, reduction="sum", return_grad=True,
    )  # fmt: skip
    ranges = fast.get_rnnt_prune_ranges(
        px_grad=by_label, py_grad=by_blank, boundary=boundary, s_range=min(problem.band, labels.shape[1] + 1)
    )
    encoded, predicted = fast.do_rnnt_pruning(am=problem.encoded, lm=problem.predicted, ranges=ranges)
    logits = problem.output(torch.tanh(encoded + predicted)).float()
    pruned = fast.rnnt_loss_pruned(
        logits=logits, symbols=labels, ranges=ranges, termination_symbol=0, boundary=boundary, reduction="sum"
    )
    return pruned + simple


def transformers_tdt_loss(problem: Problem) -> Tensor:
    """TDT loss of transformers, of its Parakeet models."""
    return importlib.import_module("transformers.loss.loss_tdt").tdt_loss(**problem.tdt_arguments())


PEERS: dict[str, Callable[[Problem], Tensor]] = {
    "torchaudio": torchaudio_loss,
    "fast_rnnt": fast_rnnt_loss,
    "fast_rnnt_pruned": fast_rnnt_pruned_loss,
    "warprnnt_numba": warprnnt_numba_loss,
    "transformers_tdt": transformers_tdt_loss,
}
"""name -> summed loss of a problem"""

PACKAGES = {name: name.removesuffix("_pruned").removesuffix("_tdt") for name in PEERS}
"""required package by system"""


def unavailable_reason(system: str) -> str | None:
    """Reason and install command if the package of a system is missing, else None."""
    package = PACKAGES.get(system)
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    source = "see benchmarks/rnnt_loss_peers.py" if package == "fast_rnnt" else "-r requirements-benchmarks.txt"
    return f"{system} is skipped: {package} is not installed (pip install {source})"
