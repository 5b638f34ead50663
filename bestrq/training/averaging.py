"""Averages of the weights over training: an exponential moving average, and the mean of the last validated weights.

Both are validated and exported in place of the weights of a step; training itself is not changed by them.

Sources: exponential moving average with a warm-up of the decay: TensorFlow's `ExponentialMovingAverage`
(`num_updates`); mean of checkpoints: Vaswani et al., arXiv 1706.03762, section 6.1, and Izmailov et al., arXiv
1803.05407.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt
from torch import Tensor, nn

from bestrq.training.checkpoint import Checkpoint, model_slots
from bestrq.training.checkpoint_saving import gather_model
from bestrq.training.process import World, local
from bestrq.training.tensor_files import write_tensors
from bestrq.training.tensor_reading import StoredTensors
from bestrq.training.tensor_slots import fill
from common.errors import UserError
from common.files import replace_file
from common.json_checks import count

PREFIX = "average/"
"""of the names of the moving average among the extra tensors of a checkpoint"""


@dataclass
class AveragingSettings:
    """Averages of the weights, which are validated and exported in place of the weights themselves."""

    ema_decay: ClosedUnitInterval = 0.0
    """decay of the exponential moving average per step, such as 0.999; smaller at first: min(decay, (1 + n) / (10 + n))
    in step n. 0 disables it. It takes 4 bytes per parameter (sharded with fsdp), on the device and in checkpoints"""
    last: NonNegativeInt = 0
    """number of validations, the last ones, whose weights are averaged at the end of the run; 0 or 1 disables it. Their
    weights are kept in RUN_FOLDER/averaging, 4 bytes per parameter each"""

    def __post_init__(self) -> None:
        if self.ema_decay == 1:
            raise UserError("averaging.ema_decay is 1, which keeps the initial weights: give less than 1")


class Averages:
    """Moving average of a model's weights, and files with its last validated weights.

    Parameters and floating-point buffers are averaged; other buffers, such as counters, are copied. All ranks must call
    every method.

    Args:
        model: wrapped by `parallelise`; its weights are the initial value of the moving average.
        folder: of the files with validated weights.
        validations: steps of all validations of the run, ascending.
    """

    def __init__(
        self, settings: AveragingSettings, model: nn.Module, folder: Path, validations: list[int], world: World
    ) -> None:
        self.settings, self.folder, self.world = settings, folder, world
        self.updates = 0  # steps in the moving average
        self.kept = validations[-settings.last :] if settings.last > 1 else []
        self.average: dict[str, Tensor] = {}
        if settings.ema_decay:
            self.average = {name: tensor.detach().clone() for name, tensor in model_slots(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the weights after an optimizer step to the moving average: a += (1 - decay) (w - a)."""
        if not self.average:
            return
        self.updates += 1
        decay = min(self.settings.ema_decay, (1 + self.updates) / (10 + self.updates))
        slots = model_slots(model)
        pairs = [(local(average), local(slots[name])) for name, average in self.average.items()]
        floating = [(average, weight) for average, weight in pairs if average.is_floating_point()]
        torch._foreach_lerp_([average for average, _ in floating], [weight for _, weight in floating], 1 - decay)
        for average, weight in pairs:
            if not average.is_floating_point():
                average.copy_(weight)

    def validated(self, model: nn.Module, step: int) -> Iterator[str]:
        """Yield, for each set of weights to validate, their name in the metrics, while the model holds them.

        "dev": the moving average, or the weights themselves without one. At the last validation also "dev_average": the
        mean of the last `settings.last` of these. The model has its own weights again afterwards.
        """
        with self._held(model, self.average):
            yield "dev"
            if step in self.kept:
                self._store(model, step)
        if self.kept and step == self.kept[-1]:
            with self._held(model, self._mean(model)):
                yield "dev_average"

    def tensors(self) -> dict[str, Tensor]:
        """Moving average, for the extra tensors of a checkpoint; sharded as the model."""
        return {f"{PREFIX}{name}": tensor for name, tensor in self.average.items()}

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint. Raises UserError if its moving average does not fit the model."""
        if self.average:
            tensors = {
                name.removeprefix(PREFIX): tensor
                for name, tensor in checkpoint.extra_tensors.items()
                if name.startswith(PREFIX)
            }
            fill(self.average, tensors, checkpoint.path / "extra.safetensors")
            count(checkpoint.state.get("averaged_updates"), f"{checkpoint.path / 'state.json'}: averaged_updates")
            self.updates = checkpoint.state["averaged_updates"]

    @contextmanager
    def _held(self, model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
        """Exchange the weights of the model for others within a context; {} changes nothing."""
        _exchange(model, weights)
        try:
            yield
        finally:
            _exchange(model, weights)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"

    def _store(self, model: nn.Module, step: int) -> None:
        weights, problem = gather_model(model, self.world), ""
        if self.world.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with replace_file(self._path(step)) as file:
                    write_tensors(file, weights)
            except OSError as error:
                problem = f"cannot write {self._path(step)}: {error}"
        if problem := self.world.broadcast(problem):
            raise UserError(problem)

    @torch.no_grad()
    def _mean(self, model: nn.Module) -> dict[str, Tensor]:
        """Mean of the stored weights, with the shards of the model."""
        try:
            mean = mean_of_files([[self._path(step)] for step in self.kept])
        except UserError as error:
            raise UserError(
                f"averaging.last is {self.settings.last}, but the weights of a validation cannot be read: {error}; "
                f"restore the files of {self.folder}"
            ) from error
        weights = {name: torch.empty_like(slot) for name, slot in model_slots(model).items()}
        fill(weights, mean, self.folder)
        return weights


@torch.no_grad()
def mean_of_files(sources: Sequence[Sequence[Path]], prefix: str = "") -> dict[str, Tensor]:
    """Mean of the tensors of several sources, computed in float64, as float32, on the CPU.

    Tensors that are not floating-point, such as counters, are those of the last source. One tensor of each source is in
    memory at a time.

    Args:
        sources: the safetensors files of each.
        prefix: only tensors whose names begin with it are read, and returned without it.

    Raises:
        UserError: a file cannot be read, a source has other tensors or shapes than the last one, or non-finite values;
            the message names file and tensor.
    """
    stored = [StoredTensors(paths) for paths in sources]
    names = [{name for name in tensors if name.startswith(prefix)} for tensors in stored]
    for tensors, own in zip(stored, names, strict=True):
        if different := sorted(own ^ names[-1]):
            raise UserError(f"{tensors.source} and {stored[-1].source} have different tensors, such as {different[0]}")
    mean: dict[str, Tensor] = {}
    for name in sorted(names[-1]):
        values = [_finite_tensor(tensors, name) for tensors in stored]
        last = values[-1]
        for tensors, value in zip(stored, values, strict=True):
            if (value.shape, value.dtype) != (last.shape, last.dtype):
                places = f"{_described(value)} in {tensors.path(name)}, {_described(last)} in {stored[-1].path(name)}"
                raise UserError(f"{name} is {places}")
        mean[name.removeprefix(prefix)] = (
            torch.stack(values).double().mean(dim=0).float() if last.is_floating_point() else last
        )
    return mean


def _finite_tensor(tensors: StoredTensors, name: str) -> Tensor:
    tensor = tensors[name]
    if not bool(tensor.isfinite().all()):
        raise UserError(
            f"{tensors.path(name)}: {name} has non-finite values, the training diverged: give earlier weights"
        )
    return tensor


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


@torch.no_grad()
def _exchange(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Exchange values in place, with temporary memory for one tensor."""
    slots = model_slots(model) if weights else {}
    for name, weight in weights.items():
        ours, other = local(slots[name]), local(weight)
        held = ours.clone()
        ours.copy_(other)
        other.copy_(held)
