"""What the two fine-tuning scripts share: settings, crops, held-out recordings, tokenizer, checkpoint, export."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from bestrq.long_form.inference import InferenceSettings, Source
from bestrq.model.conformer import EncoderSettings
from bestrq.recognition.ctc import read_pretrained_encoder
from bestrq.recognition.spec_augment import SpecAugmentSettings
from bestrq.training.checkpoint import CheckpointSettings, gather_model, prune_checkpoints, save_checkpoint
from bestrq.training.export import Export, write_export
from bestrq.training.optimizer import OptimizerSettings
from bestrq.training.precision import Precision, warn_of_emulation
from bestrq.training.process import FREE_DISTRIBUTED_FIELDS, DistributedSettings, World, unwrap
from bestrq.training.run_folder import RunFolder, RunSettings
from bestrq.training.update import GuardSettings
from common.config import to_dict
from common.errors import UserError
from common.files import hash_of_file
from data.features import FeatureSettings, difference
from data.format.dataset import Dataset, Normalisation
from data.loading.cutting import CuttingSettings
from data.loading.loader import FREE_LOADER_FIELDS, LOADER_PLACES, Batch, DataState, LoaderSettings, RowLoader
from data.loading.mixture import DatasetGroup
from data.loading.order import CropTable
from data.loading.supervised import supervised_crops
from data.tokenizer import BPETokenizer, CharTokenizer, Tokenizer, load_tokenizer, tokenizer_files
from pipelines.validation import Heldout, ValidationSettings


@dataclass
class FinetuneSettings:
    """What is trained, and from where."""

    init: str = ""
    """export (or one checkpoint) of a pretrained encoder; empty trains from scratch"""
    reinitialise_top_blocks: int = 0
    """top blocks of the pretrained encoder that get fresh weights: they have specialised on predicting codes"""
    freeze_encoder_steps: int = 0
    """first updates that train the head alone"""
    encoder_learning_rate: float = 0.0
    """learning rate of the encoder; 0 takes optimizer.learning_rate, which is the head's"""
    tokenizer: Literal["char", "bpe"] = "char"
    """characters, or SentencePiece byte pairs"""
    vocab_size: int = 512
    """ids of the bpe tokenizer, the blank included"""
    language: str = ""
    """train and validate on this language only; empty takes all"""
    label_minutes: float = 0.0
    """train on this much audio only, chosen at random by data.seed; 0 takes all"""

    def __post_init__(self) -> None:
        for name in ("reinitialise_top_blocks", "freeze_encoder_steps", "encoder_learning_rate", "label_minutes"):
            if getattr(self, name) < 0:
                raise UserError(f"finetune.{name} is {getattr(self, name)}: give 0 or more")
        if self.reinitialise_top_blocks and not self.init:
            raise UserError(
                f"finetune.reinitialise_top_blocks is {self.reinitialise_top_blocks}, but finetune.init is empty: "
                "all blocks are fresh already, give 0"
            )


@dataclass(frozen=True)
class CurriculumStage:
    """From some update on, longer context."""

    after_step: int = 0
    """updates before it; 1 or more, and more than those of the stage before"""
    row_frames: int = 2000
    """frames in a row, in place of data.row_frames; an update has as many fewer rows, so its frames stay as many"""
    max_seconds: float = 20.0
    """longest piece, in place of data.max_seconds"""


@dataclass
class FinetuneConfig:
    """What every fine-tuning has; a script adds its own."""

    run: RunSettings = field(default_factory=RunSettings)
    """folder, length and seed"""
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    """start, tokenizer and labels"""
    data: LoaderSettings = field(default_factory=LoaderSettings)
    """dataset, rows and packing"""
    curriculum: list[CurriculumStage] = field(default_factory=list)
    """later stages of training, each with longer rows and pieces; the first one is that of data"""
    cutting: CuttingSettings = field(default_factory=CuttingSettings)
    """words at the cuts of long recordings"""
    accumulation: int = 1
    """micro-batches an update: divides the rows that a process holds at once"""
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    """the Conformer; with finetune.init its shape must be the export's, its dropout may differ"""
    spec_augment: SpecAugmentSettings = field(default_factory=SpecAugmentSettings)
    """masks on the training features"""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """AdamW and its schedule"""
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    """held-out error rates"""
    inference: InferenceSettings = field(default_factory=InferenceSettings)
    """how held-out recordings are cut and batched"""
    guard: GuardSettings = field(default_factory=GuardSettings)
    """what to do about bad numbers"""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    """when to save, and what to keep"""
    distributed: DistributedSettings = field(default_factory=DistributedSettings)
    """processes, devices and precision"""


# What may change between two starts of one run: nothing here alters which updates are made.
FREE_FIELDS = (
    "accumulation",
    "checkpoint",
    *(f"distributed.{name}" for name in FREE_DISTRIBUTED_FIELDS),
    "encoder.activation_checkpointing",
    "encoder.backend",
    "guard.max_bad_updates",
    *(f"data.{name}" for name in FREE_LOADER_FIELDS),
    "inference.batch_seconds",
    "run.folder",
    "run.log_every",
)
# Fields that may hold another location if the fingerprint of the data is the same.
PLACES = {f"data.{name}": "dataset" for name in LOADER_PLACES}


@dataclass
class Best:
    """The best validation so far; its step is 0 before the first."""

    rate: float = math.inf
    step: int = 0


def read_init(config: FinetuneConfig, dataset: Dataset) -> Export:
    """The pretrained encoder, checked against the settings and the dataset. Raises UserError naming what differs."""
    pretrained = read_pretrained_encoder(config.finetune.init, config.encoder)
    theirs, ours = pretrained.config.get("normalisation"), config.data.normalisation
    differing = difference(dataset.features, FeatureSettings.from_dict(pretrained.config.get("features", {})))
    if theirs != ours:
        differing.append(f"data.normalisation: {ours!r} != {theirs!r}")
    if differing:
        raise UserError(f"finetune.init {config.finetune.init} does not fit (ours != the export's): {differing}")
    return pretrained


def start_run(
    run: RunFolder, config: FinetuneConfig, dataset: Dataset, world: World, precision: Precision,
    also_free: Sequence[str] = (),
) -> None:  # fmt: skip
    """`RunFolder.start` for fine-tuning. A resumed run takes its weights from a checkpoint, so finetune.init is only
    checked if it changed, and must then hold the same weights.
    """
    init = config.finetune.init
    origins = {"finetune.init": partial(weights_fingerprint, init)} if init else {}
    facts = {"precision": str(precision)}
    run.start(config, world, (*FREE_FIELDS, *also_free), dataset.identity(), PLACES, origins, facts)


def weights_fingerprint(init: str) -> str:
    """SHA-256 (hex) of the weights of an export or checkpoint. Raises UserError if there are none."""
    try:
        return hash_of_file(Path(init) / "model.safetensors")
    except OSError as error:
        raise UserError(
            f"finetune.init is {init}, which cannot be compared with the weights that this run began with: {error}; "
            "give the old value, or the new location of that export"
        ) from error


def stages_of(config: FinetuneConfig) -> list[tuple[int, LoaderSettings]]:
    """(updates before it, rows) of every stage of the curriculum. Raises UserError where one does not fit."""
    stages = [(0, config.data)]
    frames = config.data.rows * config.data.row_frames
    for number, stage in enumerate(config.curriculum):
        if stage.after_step <= stages[-1][0]:
            raise UserError(
                f"curriculum[{number}].after_step is {stage.after_step}: give more than {stages[-1][0]}, the updates "
                "before the stage before"
            )
        if stage.row_frames < 1 or frames % stage.row_frames:
            raise UserError(
                f"curriculum[{number}].row_frames is {stage.row_frames}: an update has data.rows x data.row_frames = "
                f"{frames} frames, which are no whole number of such rows; give a divisor of it"
            )
        rows = replace(
            config.data, row_frames=stage.row_frames, rows=frames // stage.row_frames, max_seconds=stage.max_seconds
        )
        stages.append((stage.after_step, rows))
    return stages


class Updates:
    """The micro-batches of every update from `step` on, by one `RowLoader` after another: the curriculum."""

    def __init__(
        self, dataset: Dataset, crops: list[CropTable], config: FinetuneConfig, world: World, step: int,
        state: DataState | None,
    ) -> None:  # fmt: skip
        """crops: of every stage. state: the loader's after update `step`, which counts if that stage goes on."""
        self.step, self.stages = step, stages_of(config)
        self.quarantined: dict[str, str] = {}
        self._open = lambda stage, state: RowLoader(
            dataset,
            crops[stage],
            self.stages[stage][1],
            multiple=config.encoder.row_multiple,
            row_gap=config.encoder.row_gap,
            rank=world.rank,
            world_size=world.size,
            accumulation=config.accumulation,
            state=state,
        )
        for stage in range(len(self.stages)):
            self._open(stage, None)  # rows that processes cannot share are an error now, which costs no training
        stage = self._stage_of(step + 1)
        goes_on = step > 0 and self._stage_of(step) == stage
        self.loader = self._open(stage, state if goes_on else None)

    @property
    def state(self) -> DataState:
        """The loader's, for a checkpoint."""
        return self.loader.state

    def _stage_of(self, update: int) -> int:
        return max(stage for stage, (before, _) in enumerate(self.stages) if update > before)

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            batches = self.loader.steps()
            stage = self._stage_of(self.step + 1)
            while self._stage_of(self.step + 1) == stage:
                self.step += 1
                yield next(batches)
                self.quarantined |= self.loader.quarantined
            batches.close()  # its workers, before the next ones start
            self.loader = self._open(stage + 1, None)


def labelled_crops(dataset: Dataset, config: FinetuneConfig, data: LoaderSettings) -> CropTable:
    """Training crops with their label texts, as long as the stage's `data` has them; of `label_minutes`, whole
    recordings chosen by the seed."""
    recordings = dataset.select(split=config.data.split, language=config.finetune.language or None)
    told = np.array([dataset.text(int(i)) is not None for i in recordings])
    if 0 < told.sum() < len(told):
        print(f"left out: {len(told) - told.sum()} of {len(told)} recordings, which have no transcript")
        recordings = recordings[told]
    if config.finetune.label_minutes:
        shuffled = np.random.default_rng(config.data.seed).permutation(recordings)
        minutes = np.cumsum(dataset.frames[shuffled]) / dataset.features.frames_per_second / 60
        recordings = np.sort(shuffled[: max(1, int((minutes <= config.finetune.label_minutes).sum()))])
    cut = partial(supervised_crops, dataset, cutting=config.cutting)
    lengths = data.crop_frames(dataset)
    return config.data.mixed_order(dataset, recordings, lambda group, seed: cut(group, *lengths, seed))


def heldout_recordings(dataset: Dataset, config: FinetuneConfig) -> list[Heldout]:
    """The held-out recordings that have a transcript, longest first. Raises UserError if there are none."""
    selected = dataset.select(split=config.validation.split, language=config.finetune.language or None)
    recordings = [int(i) for i in selected if dataset.text(int(i))]
    if not recordings:
        raise UserError(
            f"validation.split {config.validation.split!r} of {dataset.location}: no recording has a transcript"
        )
    recordings = recordings[: config.validation.max_recordings or None]
    read = partial(read_mel, dataset, config.data.normalisation)
    heldout = []
    for i in sorted(recordings, key=lambda i: (-int(dataset.frames[i]), i)):
        source = Source(int(dataset.frames[i]), partial(read, i), dataset.excluded(i) or ())
        heldout.append(Heldout(dataset.id(i), source, dataset.text(i) or "", dataset.language(i)))
    return heldout


def read_mel(dataset: Dataset, normalisation: Normalisation, recording: int, start: int, stop: int) -> torch.Tensor:
    """Normalised frames of a recording, float32 [stop - start, M]."""
    return torch.from_numpy(dataset.read_normalised(recording, start, stop, normalisation=normalisation))


def heldout_inference(config: FinetuneConfig, world: World) -> InferenceSettings:
    """`config.inference`; in bfloat16 where FSDP2 gathers the blocks' weights in it, for float32 does not fit these.

    Raises UserError for a mode that not every model can be validated in.
    """
    if config.inference.mode in ("streaming", "averaged"):
        raise UserError(
            f"inference.mode is {config.inference.mode!r}: validation knows buffered, stitched and whole; "
            "give one of these, evaluate.py has the others"
        )
    warn_of_emulation("inference.precision", config.inference.precision, world)
    sharded = world.size > 1 and config.distributed.strategy == "fsdp"
    if sharded and config.distributed.precision == "bfloat16":
        return replace(config.inference, precision="bfloat16")
    return config.inference


def run_tokenizer(run: RunFolder, texts: list[str], settings: FinetuneSettings, world: World) -> Tokenizer:
    """The run's tokenizer: trained on the training texts at the first start, read from the run folder after it."""
    folder = run.path / "tokenizer"
    problem = ""
    if world.is_main and not folder.is_dir():
        try:
            if settings.tokenizer == "bpe":
                BPETokenizer.train(texts, settings.vocab_size).save(folder)
            else:
                CharTokenizer.train(texts).save(folder)
        except UserError as error:  # told to all: the others would wait for rank 0 in vain
            problem = str(error)
    if problem := world.broadcast(problem):
        raise UserError(problem)
    return load_tokenizer(folder)


def save(run, step, model, optimizer, data_state, best, dataset, config, world) -> None:
    """A checkpoint; all but the last ones and the best are deleted."""
    state = {"data": data_state.to_dict(), "best": {"rate": best.rate, "step": best.step}}
    state |= {"features": dataset.features.to_dict(), "precision": config.distributed.precision}
    save_checkpoint(run.checkpoints, step, model, optimizer, state, world)
    prune_checkpoints(run.checkpoints, config.checkpoint.keep_last, best.step, world)


def statistics_of(dataset: Dataset, normalisation: Normalisation) -> dict[str, Any]:
    """What transcribe.py must know to normalise sound as training did, where the dataset has statistics of its own."""
    if normalisation == "recording" or isinstance(dataset, DatasetGroup):
        return {}
    mean, inverse_std = dataset.statistics(0, normalisation)
    return {"statistics": {"mean": mean.tolist(), "inverse_std": inverse_std.tolist()}}


TITLES = {"ctc": "CTC recogniser", "rnnt": "RNN-T recogniser"}


def export(run, step, model, tokenizer, rates, dataset, config, world, kind, **description: Any) -> None:
    """What evaluate.py needs: the whole model, its settings, tokenizer, features. kind: a key of `TITLES`."""
    whole = gather_model(model, world)
    if world.is_main:
        description |= {
            "kind": kind,
            "step": step,
            "encoder": to_dict(config.encoder),
            "vocab_size": tokenizer.vocab_size,
            "features": dataset.features.to_dict(),
            "feature_hash": dataset.features.hash(),
            "normalisation": config.data.normalisation,
            **statistics_of(dataset, config.data.normalisation),
            **rates,
        }
        folder = run.path / "tokenizer"
        files = {name: (folder / name).read_bytes() for name in tokenizer_files(folder)}
        card = f"""# {TITLES[kind]}

{config.encoder.num_layers} Conformer layers of width {config.encoder.dim}, {tokenizer.vocab_size} labels, trained on
`{dataset.location}` from {config.finetune.init or "scratch"}. Update {step}: WER {rates["dev_wer"]:.2%},
CER {rates["dev_cer"]:.2%} on the `{config.validation.split}` split. To evaluate it:
`python evaluate.py --export THIS_FOLDER --data.dataset DATASET`.
"""
        write_export(run.export, whole, description, card, files)
    world.barrier()


def describe(
    config: FinetuneConfig, precision: Precision, model: nn.Module, crops: CropTable, dataset: Dataset, world: World,
    step: int,
) -> str:  # fmt: skip
    """The first line of the console."""
    millions = sum(parameter.numel() for parameter in unwrap(model).parameters()) / 1e6
    hours = crops.mean_frames * len(crops) / dataset.features.frames_per_second / 3600
    start = f"continuing after step {step}" if step else "starting"
    return (
        f"{start}: {millions:.1f} M parameters from {config.finetune.init or 'scratch'}, {world.size} process(es) on "
        f"{world.device.type} in {precision}, {hours:.2f} h of labels in {dataset.location}, run {config.run.folder}"
    )
