"""Shared code of the fine-tuning scripts: settings, held-out data, tokenizer, checkpoints, export."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import nn

from bestrq.long_form.inference import InferenceSettings, RecordingSource
from bestrq.model.conformer import EncoderSettings
from bestrq.recognition.hidden_masks import HiddenMaskSettings
from bestrq.recognition.spec_augment import SpecAugmentSettings
from bestrq.training.averaging import Averages, AveragingSettings
from bestrq.training.background_writer import BackgroundWriter
from bestrq.training.checkpoint import (
    Checkpoint,
    CheckpointSettings,
    load_checkpoint,
    prune_checkpoints,
)
from bestrq.training.checkpoint_saving import gather_model, submit_checkpoint, take_snapshot
from bestrq.training.export import write_export
from bestrq.training.inference_precision import inference_precision
from bestrq.training.meters import start_line
from bestrq.training.optimizer import GuardSettings, OptimizerSettings
from bestrq.training.precision import Precision, warn_of_emulation
from bestrq.training.process import DistributedSettings, World, unwrap
from bestrq.training.run_folder import (
    FREE_RUN_FIELDS,
    NormSettings,
    ProfileSettings,
    RunFolder,
    RunSettings,
    TrackingSettings,
)
from common.config import to_dict
from common.errors import UserError
from common.files import new_folder
from common.json_checks import count, fields, real
from data.format.dataset import STD_FLOOR, Dataset, Normalisation
from data.loading.augment import SupervisedSettings
from data.loading.cutting import CuttingSettings
from data.loading.loader import FREE_LOADER_FIELDS, LOADER_PLACES, CurriculumStage, DataState
from data.loading.mixture import DatasetGroup
from data.loading.order import CropTable
from data.tokenizer import TOKENIZER_FILE, BPETokenizer, CharTokenizer, Tokenizer, load_tokenizer, tokenizer_files
from pipelines.kernels import check_kernels
from pipelines.run_weights import hash_of_weights
from pipelines.validation import Heldout, ValidationSettings

# ---- Settings ----


@dataclass
class FinetuneSettings:
    """Initial weights, tokenizer and labels of a fine-tuning run."""

    init: str = ""
    """export (or checkpoint) of a pretrained encoder; empty trains from scratch"""
    drop_top_blocks: NonNegativeInt = 0
    """top blocks of the pretrained encoder to leave out: encoder.num_layers is that of the export minus these"""
    reinitialise_top_blocks: NonNegativeInt = 0
    """top blocks of the (remaining) pretrained encoder to re-initialise; they are specialised in predicting codes"""
    freeze_encoder_steps: NonNegativeInt = 0
    """number of initial steps in which the parameters from finetune.init are frozen, while the head and re-initialised
    blocks train; no effect from scratch (10,000 of 13,000 steps in fairseq's wav2vec 2.0 recipe for 10 minutes)"""
    encoder_learning_rate: NonNegativeFloat = 0.0
    """learning rate of the parameters from finetune.init; 0 takes optimizer.learning_rate, as for all others"""
    layer_decay: ClosedUnitInterval = 1.0
    """factor of the learning rate from one block from finetune.init to the one below it (ELECTRA, BEiT: 0.65 to 0.9);
    the top one has encoder_learning_rate"""
    tokenizer: Literal["char", "bpe"] = "char"
    """characters, or SentencePiece byte pairs"""
    vocab_size: int = 512
    """ids of the bpe tokenizer, including the blank"""
    language: str = ""
    """language for training and validation; empty takes all"""
    label_minutes: NonNegativeFloat = 0.0
    """minutes of labelled audio for training, chosen at random by data.seed; 0 takes all. Parts of data.mixture with
    pseudo_labels are not limited"""

    def __post_init__(self) -> None:
        for name in ("reinitialise_top_blocks", "drop_top_blocks"):
            if getattr(self, name) and not self.init:
                raise UserError(
                    f"finetune.{name} is {getattr(self, name)}, but finetune.init is empty: "
                    "training from scratch initialises all blocks, give 0"
                )
        if self.layer_decay == 0:
            raise UserError("finetune.layer_decay is 0, which freezes all blocks but one: give more than 0")


@dataclass
class FinetuneConfig:
    """Settings of every fine-tuning script; a script adds its own."""

    run: RunSettings = field(default_factory=RunSettings)
    """folder, length and seed"""
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    """initial weights, tokenizer and labels"""
    data: SupervisedSettings = field(default_factory=SupervisedSettings)
    """dataset, rows, packing and augmentation"""
    curriculum: list[CurriculumStage] = field(default_factory=list)
    """later stages of training, for example with longer rows and crops; data describes the first stage"""
    cutting: CuttingSettings = field(default_factory=CuttingSettings)
    """treatment of words at the cuts of long recordings"""
    accumulation: PositiveInt = 1
    """micro-batches per step: divides the rows that a process holds at once"""
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    """Conformer; with finetune.init it must match the export, except for dropout"""
    spec_augment: SpecAugmentSettings = field(default_factory=SpecAugmentSettings)
    """masks on training features"""
    hidden_masks: HiddenMaskSettings = field(default_factory=HiddenMaskSettings)
    """masks on the outputs of the subsampling"""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """optimizer and schedule of the learning rate"""
    averaging: AveragingSettings = field(default_factory=AveragingSettings)
    """averages of the weights for validation and export"""
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    """error rates on held-out recordings"""
    inference: InferenceSettings = field(default_factory=InferenceSettings)
    """windows and batches of held-out recordings"""
    guard: GuardSettings = field(default_factory=GuardSettings)
    """handling of non-finite losses and gradients"""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    """interval and number of checkpoints"""
    distributed: DistributedSettings = field(default_factory=DistributedSettings)
    """processes, devices and precision"""
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    """experiment tracker"""
    profile: ProfileSettings = field(default_factory=ProfileSettings)
    """trace of some steps"""
    norms: NormSettings = field(default_factory=NormSettings)
    """norms of gradients and activations by module"""


# Fields that may change when a run is resumed, because they do not affect the weights.
FREE_FIELDS = (
    *FREE_RUN_FIELDS,
    "encoder.activation_checkpointing",
    "encoder.backend",
    "encoder.compile",
    *(f"data.{name}" for name in FREE_LOADER_FIELDS),
    "inference.batch_seconds",
    "inference.precision",
)
# Fields that may name another location of the same data, which is checked by its fingerprint.
PLACES = {f"data.{name}": "dataset" for name in LOADER_PLACES}


# ---- Held-out data ----


def heldout_recordings(dataset: Dataset, config: FinetuneConfig) -> list[Heldout]:
    """Held-out recordings with a transcript, longest first. Raises UserError if there are none."""
    selected = dataset.select(split=config.validation.split, language=config.finetune.language or None)
    recordings = [int(i) for i in selected if dataset.text(int(i))]
    if not recordings:
        raise UserError(
            f"validation.split is {config.validation.split!r}: no recording of that split has a transcript in "
            f"{dataset.location}; give another split"
        )
    recordings = recordings[: config.validation.max_recordings or None]
    read = partial(read_mel, dataset, config.data.normalisation)
    heldout = []
    for i in sorted(recordings, key=lambda i: (-int(dataset.frames[i]), i)):
        source = RecordingSource(int(dataset.frames[i]), partial(read, i), dataset.excluded(i) or ())
        heldout.append(Heldout(dataset.id(i), source, dataset.text(i) or "", dataset.language(i)))
    return heldout


def read_mel(dataset: Dataset, normalisation: Normalisation, recording: int, start: int, stop: int) -> torch.Tensor:
    """Normalised frames of a recording, float32 [stop - start, M]."""
    return torch.from_numpy(dataset.read_normalised(recording, start, stop, normalisation=normalisation))


def heldout_inference(config: FinetuneConfig, world: World) -> InferenceSettings:
    """`config.inference`, with its precision resolved.

    It is bfloat16 if FSDP2 gathers the weights in bfloat16, as float32 inputs would not match them. 'auto' is bfloat16
    for training in bfloat16 on GPUs that multiply it in hardware, else float32.

    Raises:
        UserError: validation does not support the inference mode.
    """
    if config.inference.mode in ("streaming", "averaged"):
        raise UserError(
            f"inference.mode is {config.inference.mode!r}: validation supports buffered, stitched and whole; "
            "give one of these and use evaluate.py for the others"
        )
    warn_of_emulation("inference.precision", config.inference.precision, world)
    sharded = world.size > 1 and config.distributed.strategy != "ddp"
    if config.inference.precision == "auto" and config.distributed.precision != "bfloat16":
        return replace(config.inference, precision="float32")
    precision = "bfloat16" if sharded else inference_precision(config.inference.precision, world)
    return replace(config.inference, precision=precision)


# ---- Run folder ----


@dataclass(frozen=True)
class FinetuneRun:
    """Folder, settings, data and processes of a fine-tuning run."""

    folder: RunFolder
    config: FinetuneConfig
    dataset: Dataset
    world: World


@dataclass
class Best:
    """Best validation so far; step 0 before the first validation."""

    rate: float = math.inf
    step: int = 0


def start_run(run: FinetuneRun, precision: Precision, also_free: Sequence[str] = ()) -> None:
    """`RunFolder.start` for fine-tuning.

    A resumed run reads its weights from a checkpoint. finetune.init is therefore checked only if the path has changed:
    it must then hold the same weights.
    """
    check_kernels(run.config.encoder, run.world.device)
    init = run.config.finetune.init
    origins = {"finetune.init": partial(weights_fingerprint, init)} if init else {}
    free, facts = (*FREE_FIELDS, *also_free), {"precision": str(precision)}
    run.folder.start(run.config, run.world, free, run.dataset.identity(), PLACES, origins, facts)


def weights_fingerprint(init: str) -> str:
    """SHA-256 (hex) of the weights of an export or checkpoint. Raises UserError if there are none."""
    try:
        return hash_of_weights(init)
    except (OSError, UserError) as error:
        raise UserError(
            f"finetune.init is {init}, which cannot be compared with the initial weights of this run: {error}; "
            "give the old path, or the new location of that export"
        ) from error


def run_tokenizer(run: RunFolder, texts: list[str], settings: FinetuneSettings, world: World) -> Tokenizer:
    """Tokenizer of the run: trained on the training texts at the first start, read from the run folder afterwards."""
    folder = run.path / "tokenizer"
    problem = ""
    if world.is_main and not (folder / TOKENIZER_FILE).exists():
        try:
            bpe = settings.tokenizer == "bpe"
            tokenizer = BPETokenizer.train(texts, settings.vocab_size) if bpe else CharTokenizer.train(texts)
            shutil.rmtree(folder, ignore_errors=True)  # of a start that was killed before it wrote the file
            with new_folder(folder) as temporary:
                tokenizer.save(temporary)
        except UserError as error:  # broadcast, so that no rank waits for rank 0
            problem = str(error)
    if problem := world.broadcast(problem):
        raise UserError(problem)
    return load_tokenizer(folder)


def make_averages(run: FinetuneRun, model: nn.Module) -> Averages:
    """Averages of the weights, for the validations of the run."""
    steps, every = run.config.run.steps, run.config.validation.every_steps
    validations = sorted({*range(every, steps + 1, every), steps})
    return Averages(run.config.averaging, model, run.folder.path / "averaging", validations, run.world)


def save(
    run: FinetuneRun, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, data_state: DataState, best: Best,
    averages: Averages, writer: BackgroundWriter,
) -> None:  # fmt: skip
    """Save a checkpoint and delete old ones except the best, in the background; all ranks must call it."""
    writer.begin(step)
    state: dict[str, Any] = {"data": data_state.to_dict(), "best": {"rate": best.rate, "step": best.step}}
    state |= {"features": run.dataset.features.to_dict(), "precision": run.config.distributed.precision}
    state |= {"averaged_updates": averages.updates}
    settings, folder = run.config.checkpoint, run.folder.checkpoints
    tensors = averages.tensors()
    snapshot = take_snapshot(step, model, optimizer, state, run.world, tensors, settings.file_gigabytes)
    submit_checkpoint(writer, folder, snapshot)
    writer.submit(prune_checkpoints, folder, settings, best.step)


def resume(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, averages: Averages, world: World
) -> tuple[int, DataState, Best]:
    """Load a checkpoint. Returns `restored`; files of the checkpoint are not open any more."""
    checkpoint = load_checkpoint(path, model, optimizer, world)
    averages.load(checkpoint)
    return restored(checkpoint)


def restored(checkpoint: Checkpoint) -> tuple[int, DataState, Best]:
    """Step, position in the data and best validation of a checkpoint. Raises UserError if one is invalid."""
    best: Any = checkpoint.state.get("best")
    fields({"rate": real, "step": count})(best, f"{checkpoint.path / 'state.json'}: state.best")
    return checkpoint.step, DataState.from_dict(checkpoint.state.get("data", {})), Best(best["rate"], best["step"])


def statistics_of(dataset: Dataset, normalisation: Normalisation) -> dict[str, Any]:
    """Entry of config.json with the statistics by which transcribe.py normalises other audio as in training.

    Empty for normalisation by recording, and for a mixture, in which each dataset has its own statistics.
    """
    if normalisation == "recording" or isinstance(dataset, DatasetGroup):
        return {}
    mean, inverse_std = dataset.statistics(0, normalisation)
    return {"statistics": {"mean": mean.tolist(), "inverse_std": inverse_std.tolist()}}


TITLES = {"ctc": "CTC recogniser", "rnnt": "RNN-T recogniser"}
"""title of the model card, by kind of model"""


def export(
    run: FinetuneRun, step: int, model: nn.Module, tokenizer: Tokenizer, rates: Mapping[str, float],
    kind: Literal["ctc", "rnnt"], writer: BackgroundWriter, **description: Any,
) -> None:  # fmt: skip
    """Write the export that evaluate.py reads, in the background: the whole model, its settings, tokenizer, features.

    Args:
        rates: error rates dev_wer and dev_cer.
        description: further entries of config.json.
    """
    config, dataset = run.config, run.dataset
    writer.begin(step)
    weights = gather_model(model, run.world)
    if run.world.is_main:
        description |= {
            "kind": kind,
            "step": step,
            "encoder": to_dict(unwrap(model).get_submodule("encoder").settings),  # positions of the current stage
            "vocab_size": tokenizer.vocab_size,
            "features": dataset.features.to_dict(),
            "feature_hash": dataset.features.hash(),
            "normalisation": config.data.normalisation,
            "std_floor": STD_FLOOR,
            **statistics_of(dataset, config.data.normalisation),
            **rates,
        }
        folder = run.folder.path / "tokenizer"
        files = {name: (folder / name).read_bytes() for name in tokenizer_files(folder)}
        card = f"""# {TITLES[kind]}

{config.encoder.num_layers} Conformer layers of width {config.encoder.dim}, {tokenizer.vocab_size} labels, trained on
`{dataset.location}` from {config.finetune.init or "scratch"}. Step {step}: WER {rates["dev_wer"]:.2%},
CER {rates["dev_cer"]:.2%} on the `{config.validation.split}` split. To evaluate it:
`python evaluate.py --export THIS_FOLDER --data.dataset DATASET`.
"""
        writer.submit(write_export, run.folder.export, weights, description, card, files)


def describe(run: FinetuneRun, precision: Precision, model: nn.Module, crops: CropTable, step: int) -> str:
    """First line of the console output."""
    config, dataset, world = run.config, run.dataset, run.world
    hours = crops.mean_frames * len(crops) / dataset.features.frames_per_second / 3600
    return (
        f"{start_line(unwrap(model), config.finetune.init or 'scratch', precision, world, step)}, "
        f"{hours:.2f} h of labelled audio in {dataset.location}, run {config.run.folder}"
    )
