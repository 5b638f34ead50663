"""Training in stages: a curriculum changes the lengths of rows and crops; labelled crops of fine-tuning."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from bestrq.model.settings import EncoderSettings
from bestrq.training.process import World
from common.errors import UserError
from data.format.dataset import Dataset
from data.loading.augment import SupervisedSettings, augmented
from data.loading.batch import DrawMask, Mix
from data.loading.loader import Batch, CurriculumStage, DataState, LoaderSettings, RowLoader
from data.loading.mixture import DatasetGroup
from data.loading.order import CropTable
from data.loading.supervised import supervised_crops
from pipelines.finetuning import FinetuneConfig


def labelled_crops(dataset: Dataset, config: FinetuneConfig, data: SupervisedSettings) -> CropTable:
    """Training crops with their label texts; `data` gives the crop lengths of a stage.

    `finetune.label_minutes` limits the recordings as `choose_labelled` does, except those with pseudo-labels.
    """
    recordings = dataset.select(split=config.data.split, language=config.finetune.language or None)
    labelled = np.array([dataset.text(int(i)) is not None for i in recordings])
    if 0 < labelled.sum() < len(labelled):
        print(f"left out: {len(labelled) - labelled.sum()} of {len(labelled)} recordings, which have no transcript")
        recordings = recordings[labelled]
    if config.finetune.label_minutes:
        pseudo = has_pseudo_labels(dataset, recordings, config.data)
        chosen = choose_labelled(dataset, recordings[~pseudo], config.finetune.label_minutes, config.data.seed)
        recordings = np.sort(np.concatenate([chosen, recordings[pseudo]]))
    cut = partial(supervised_crops, dataset, cutting=config.cutting)
    lengths = data.crop_frames(dataset)
    crops = config.data.mixed_order(dataset, recordings, lambda group, seed: cut(group, *lengths, seed))
    return augmented(crops, data, dataset.features)


def choose_labelled(dataset: Dataset, recordings: np.ndarray, minutes: float, seed: int) -> np.ndarray:
    """Random choice of whole recordings of this total length, at least one; ascending int `[n]`.

    Args:
        recordings: those of a split and language that have a transcript.
        minutes, seed: `finetune.label_minutes` and `data.seed` of the training run.
    """
    shuffled = np.random.default_rng(seed).permutation(recordings)
    total = np.cumsum(dataset.frames[shuffled]) / dataset.features.frames_per_second / 60
    return np.sort(shuffled[: max(1, int((total <= minutes).sum()))])


def has_pseudo_labels(dataset: Dataset, recordings: np.ndarray, data: LoaderSettings) -> np.ndarray:
    """Mask of the recordings in parts of a mixture with `pseudo_labels`, bool `[n]`.

    Raises:
        UserError: no other part has any of the recordings.
    """
    if not isinstance(dataset, DatasetGroup) or not any(part.pseudo_labels for part in data.mixture):
        return np.zeros(len(recordings), bool)
    parts = np.searchsorted(dataset.first, recordings, side="right") - 1
    pseudo = np.array([part.pseudo_labels for part in data.mixture])[parts]
    if pseudo.all():
        raise UserError(
            "finetune.label_minutes chooses labelled recordings, but data.mixture has none beside pseudo-labels: add "
            "the labelled dataset, or give 0"
        )
    return pseudo


Data = TypeVar("Data", bound=LoaderSettings)


class StagedConfig(Protocol[Data]):
    """Settings of a training script that a curriculum uses."""

    data: Data
    encoder: EncoderSettings
    curriculum: list[CurriculumStage]
    accumulation: int


@dataclass(frozen=True)
class Stage(Generic[Data]):
    """Settings of a stage of training."""

    after_step: int
    """last step before the stage"""
    data: Data
    encoder: EncoderSettings
    """with the positions of the stage; no weight depends on the stage"""


def stages_of(config: StagedConfig[Data]) -> list[Stage[Data]]:
    """Stages of training, the first with `config.data` and `config.encoder`.

    Raises:
        UserError: a stage of the curriculum is invalid.
    """
    stages = [Stage(0, config.data, config.encoder)]
    frames = config.data.rows * config.data.row_frames
    for number, stage in enumerate(config.curriculum):
        if stage.after_step <= stages[-1].after_step:
            raise UserError(
                f"curriculum[{number}].after_step is {stage.after_step}: give more than {stages[-1].after_step}, the "
                "last step before the previous stage"
            )
        if stage.row_frames < 1 or frames % stage.row_frames:
            raise UserError(
                f"curriculum[{number}].row_frames is {stage.row_frames}: a step has data.rows x data.row_frames = "
                f"{frames} frames, which is not a whole number of such rows; give a divisor of {frames}"
            )
        if stage.rotary_interpolation is not None and config.encoder.position != "rotary":
            raise UserError(
                f"curriculum[{number}].rotary_interpolation is {stage.rotary_interpolation}: encoder.position is "
                f"{config.encoder.position!r}, which has no angles to interpolate; give null"
            )
        data = replace(
            config.data, row_frames=stage.row_frames, rows=frames // stage.row_frames, max_seconds=stage.max_seconds
        )
        interpolation = stage.rotary_interpolation or stages[-1].encoder.rotary_interpolation
        stages.append(Stage(stage.after_step, data, replace(config.encoder, rotary_interpolation=interpolation)))
    return stages


class CurriculumLoader:
    """Micro-batches of each step, from one `RowLoader` per stage of training.

    The rows of a step depend neither on world size nor on accumulation nor on workers, as in every `RowLoader`.

    Args:
        crops: of each stage.
        step: last completed step.
        state: position of the stage's loader after `step`, from a checkpoint; unused if a new stage starts.
        draw_mask, mix: as for `RowLoader`, for pretraining.

    Raises:
        UserError: as `RowLoader`, for any stage.
    """

    def __init__(
        self, dataset: Dataset, crops: list[CropTable], config: StagedConfig[Any], world: World, step: int,
        state: DataState | None, draw_mask: DrawMask | None = None, mix: Mix | None = None,
    ) -> None:  # fmt: skip
        self.step, self.stages = step, stages_of(config)
        self.quarantined: dict[str, str] = {}
        self._dataset, self._crops, self._config, self._world = dataset, crops, config, world
        self._draw_mask, self._mix = draw_mask, mix
        for stage in range(len(self.stages)):
            self._row_loader(stage, None)  # raises now, not hours later, if ranks cannot share the rows
        stage = self._stage_of(step + 1)
        continues = step > 0 and self._stage_of(step) == stage
        self.loader = self._row_loader(stage, state if continues else None)

    @property
    def stage(self) -> int:
        """Stage of the last step; of the first step before it."""
        return self._stage_of(max(self.step, 1))

    @property
    def state(self) -> DataState:
        """Position of the current loader, for a checkpoint."""
        return self.loader.state

    def __iter__(self) -> Iterator[list[Batch]]:
        return self.steps()

    def steps(self, interrupted: Callable[[], bool] | None = None) -> Generator[list[Batch], None, None]:
        """Yield the steps after `self.step`, as `RowLoader.steps`."""
        while True:
            batches = self.loader.steps(interrupted)
            stage = self._stage_of(self.step + 1)
            while self._stage_of(self.step + 1) == stage:
                if (micro_batches := next(batches, None)) is None:
                    return
                self.step += 1
                yield micro_batches
                self.quarantined |= self.loader.quarantined
            batches.close()  # stops the workers before those of the next stage start
            self.loader = self._row_loader(stage + 1, None)

    def _stage_of(self, step: int) -> int:
        return max(number for number, stage in enumerate(self.stages) if step > stage.after_step)

    def _row_loader(self, stage: int, state: DataState | None) -> RowLoader:
        try:
            return RowLoader(
                self._dataset,
                self._crops[stage],
                self.stages[stage].data,
                multiple=self._config.encoder.row_multiple,
                row_gap=self._config.encoder.row_gap,
                rank=self._world.rank,
                world_size=self._world.size,
                accumulation=self._config.accumulation,
                draw_mask=self._draw_mask,
                mix=self._mix,
                state=state,
            )
        except UserError as error:
            if stage == 0:
                raise
            raise UserError(f"curriculum[{stage - 1}]: {error}") from error
