"""Observers of a run that are off by default: profiler and norms by module. They do not change training."""

from torch import nn

from bestrq.training.meters import MetricsLog
from bestrq.training.process import World
from bestrq.training.run_folder import NormSettings, ProfileSettings, RunFolder


class Observers:
    """Profiler and norms of a run, each only if its settings enable it.

    Args:
        model: wrapped by `parallelise`.
    """

    def __init__(
        self, profile: ProfileSettings, norms: NormSettings, model: nn.Module, run: RunFolder, metrics: MetricsLog,
        world: World,
    ) -> None:  # fmt: skip
        self.profiler = self.norms = None
        if profile.first_step and (world.is_main or profile.all_ranks):
            from bestrq.training.profiling import StepProfiler

            self.profiler = StepProfiler(profile, run.path / "profile", world)
        if norms.every_steps:
            from bestrq.training.module_norms import ModuleNorms

            self.norms = ModuleNorms(norms, model, metrics, world)

    def start(self, step: int) -> None:
        """Called at the start of every optimizer step, before its first forward pass."""
        if self.profiler:
            self.profiler.start(step)
        if self.norms:
            self.norms.start(step)

    def before_update(self, step: int) -> None:
        """Called by all ranks after the last backward pass of a step, before gradients are clipped and cleared."""
        if self.norms:
            self.norms.write(step)

    def close(self) -> None:
        """Write a trace that the end of the run has cut."""
        if self.profiler:
            self.profiler.close()
