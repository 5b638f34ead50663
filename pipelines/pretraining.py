"""Shared code of pretraining: settings, model, targets, loader, checkpoints and export; the loop is pretrain.py.

Code for options that are off by default is imported where the option is used.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from torch import nn

from bestrq.model.conformer import EncoderSettings
from bestrq.pretraining.masking import MaskingSettings
from bestrq.pretraining.objective import BestRQ, MaskedRows, TargetSettings, mask_rows
from bestrq.pretraining.quantizer import QuantizerSettings, RandomProjectionQuantizer
from bestrq.pretraining.reporting import ProbeSettings
from bestrq.training.checkpoint import Checkpoint, CheckpointSettings
from bestrq.training.optimizer import GuardSettings, OptimizerSettings
from bestrq.training.process import DistributedSettings, World, autocast, unwrap
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
from common.segments import to_device
from data.format.dataset import STD_FLOOR, Dataset
from data.loading.heldout import HeldoutSettings, heldout_batches
from data.loading.loader import (
    FREE_LOADER_FIELDS,
    LOADER_PLACES,
    Batch,
    CurriculumStage,
    DataState,
    LoaderSettings,
    RowLoader,
)

if TYPE_CHECKING:
    from bestrq.pretraining.adaptation import Adaptation
    from bestrq.pretraining.multi_target import MultiTarget
    from bestrq.pretraining.teacher import Teacher
    from bestrq.training.background_writer import BackgroundWriter
    from pipelines.curriculum import CurriculumLoader

    Model = BestRQ | MultiTarget


@dataclass
class Config:
    """BEST-RQ pretraining."""

    run: RunSettings = field(default_factory=RunSettings)
    """folder, length and seed"""
    data: LoaderSettings = field(default_factory=LoaderSettings)
    """dataset, rows and packing"""
    curriculum: list[CurriculumStage] = field(default_factory=list)
    """later stages of training, for example with longer rows and crops; data describes the first stage"""
    accumulation: PositiveInt = 1
    """micro-batches per optimizer step: divides the rows that a process holds at once"""
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    """the Conformer"""
    quantizer: QuantizerSettings = field(default_factory=QuantizerSettings)
    """codes of the clean features"""
    targets: TargetSettings = field(default_factory=TargetSettings)
    """targets other than the quantizer's, and blocks that predict them"""
    masking: MaskingSettings = field(default_factory=MaskingSettings)
    """masks, noise and other sounds in the model's input"""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """optimizer and schedule of the learning rate"""
    validation: HeldoutSettings = field(default_factory=HeldoutSettings)
    """masked loss and accuracy on held-out audio"""
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    """probe of the frozen features on labelled recordings"""
    guard: GuardSettings = field(default_factory=GuardSettings)
    """non-finite losses and gradient spikes"""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    """frequency and retention of checkpoints"""
    distributed: DistributedSettings = field(default_factory=DistributedSettings)
    """processes, devices and precision"""
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    """experiment tracker"""
    profile: ProfileSettings = field(default_factory=ProfileSettings)
    """trace of some steps"""
    norms: NormSettings = field(default_factory=NormSettings)
    """norms of gradients and activations by module"""


# Fields that may change when a run is resumed, because they do not affect the optimizer steps.
FREE_FIELDS = (
    *FREE_RUN_FIELDS,
    *("encoder.activation_checkpointing", "encoder.backend", "encoder.compile"),
    *(f"data.{name}" for name in FREE_LOADER_FIELDS),
    "validation.every_steps",
    "probe",
)
# Fields that may name another location if the fingerprint of the data is the same.
PLACES = {**{f"data.{name}": "dataset" for name in LOADER_PLACES}, "targets.export": "targets.export"}


@dataclass
class RunState:
    """Everything that a checkpoint holds. Random generators have no state to save: see `seed_step`."""

    model: nn.Module
    """wrapped by `parallelise`"""
    optimizer: torch.optim.Optimizer
    quantizer: RandomProjectionQuantizer
    code_counts: torch.Tensor
    """int64 [C, V], counts of the targets since they last changed; their sum over ranks is saved"""
    adaptation: "Adaptation | None" = None
    """estimates projection and codes; None if they are fixed"""
    teacher: "Teacher | None" = None
    """model that gives further targets"""
    step: int = 0
    """optimizer steps done"""
    data: DataState | None = None
    """position in the stream of rows after `step`; None before the first step"""


def stages_of_run(config: Config) -> list[tuple[LoaderSettings, EncoderSettings]]:
    """Loader and encoder settings of each stage of training; one stage without a curriculum."""
    if not config.curriculum:
        return [(config.data, config.encoder)]
    from pipelines.curriculum import stages_of

    return [(stage.data, stage.encoder) for stage in stages_of(config)]


def open_teacher(config: Config, dataset: Dataset, world: World) -> "Teacher | None":
    """Model of targets.export, or None. Raises UserError if it does not fit the encoder or the features."""
    if not config.targets.export:
        return None
    from pipelines.teacher import open_teacher

    return open_teacher(config.targets, config.encoder, config.data, dataset, world)


def make_model(config: Config, teacher: "Teacher | None") -> "Model":
    """Encoder with its heads, on the CPU."""
    if not config.targets.extended:
        return BestRQ(config.encoder, config.quantizer)
    from bestrq.pretraining.multi_target import MultiTarget

    return MultiTarget(config.encoder, config.quantizer, config.targets, teacher.classes if teacher else 0)


def make_adaptation(config: Config, quantizer: RandomProjectionQuantizer) -> "Adaptation | None":
    """Estimation of the projection and the codes, or None if they are fixed."""
    if not config.quantizer.adapts and not config.targets.distill_steps:
        return None
    from bestrq.pretraining.adaptation import Adaptation

    return Adaptation(quantizer, config.quantizer, config.targets.distill_steps)


def estimate_clusters(state: RunState, config: Config, dataset: Dataset, training: np.ndarray, world: World) -> None:
    """Estimate the clusters of the teacher at the start of a run, if its labels are clusters."""
    if state.teacher is None or config.targets.kind != "clusters":
        return
    from pipelines.teacher import sample_rows

    with autocast(world, config.distributed):
        sample = sample_rows(config.targets, config.data, dataset, training, config.encoder, world)
        state.teacher.estimate(sample, config.targets.seed, world)


def make_loaders(
    config: Config, dataset: Dataset, training: np.ndarray, heldout: np.ndarray, state: RunState, world: World
) -> "tuple[RowLoader | CurriculumLoader, list[Batch]]":
    """Loader of the training batches after `state.step`, and the held-out batches of this process.

    The rows of a step depend neither on world size nor on accumulation nor on workers.

    Args:
        training, heldout: recordings, int64, of `split_recordings`.
    """
    packing = {"multiple": config.encoder.row_multiple, "row_gap": config.encoder.row_gap}
    shares = {"rank": world.rank, "world_size": world.size, "accumulation": config.accumulation}
    draw_mask = config.masking.draw_function(dataset.features.hop_ms)
    crops = [data.crop_order(dataset, training) for data, _ in stages_of_run(config)]
    mix = None
    if config.masking.mix_probability:
        from data.loading.mixing import Mixer

        masking = config.masking
        mix = Mixer(dataset, crops[0], config.data.normalisation, masking.mix_probability, masking.mix_noise_share)
    loader: RowLoader | CurriculumLoader
    if config.curriculum:
        from pipelines import curriculum

        loader = curriculum.CurriculumLoader(dataset, crops, config, world, state.step, state.data, draw_mask, mix)
    else:
        loader = RowLoader(
            dataset, crops[0], config.data, **packing, **shares, draw_mask=draw_mask, mix=mix, state=state.data
        )
    batches = heldout_batches(
        dataset, heldout, config.data, config.validation, **packing, **shares, draw_mask=draw_mask
    )
    return loader, batches


def make_probe(config: Config, dataset: Dataset, world: World) -> Any:
    """`TrainingProbe` of the settings, or None. Raises UserError without labelled recordings."""
    if not config.probe.every_steps:
        return None
    from pipelines.training_probe import TrainingProbe

    return TrainingProbe(config.probe, dataset, config.data, config.encoder, config.run.seed, world)


def masked_rows(batch: Batch, state: RunState, config: Config, world: World, training: bool = False) -> MaskedRows:
    """Masked features and targets of a batch, on the device; with other sounds and masked bands only in training."""
    assert batch.mask is not None
    log_mel = to_device(batch.log_mel, world.device)
    clean = log_mel, batch.mask, batch.segments, state.quantizer, config.encoder.stride
    received = None
    if training and (config.masking.bands or batch.received is not None):
        from pipelines.corruption import corrupted

        received = corrupted(log_mel, batch, config.masking)
    if not config.targets.extended:
        return mask_rows(*clean, config.masking.noise_std, None, received)
    from bestrq.pretraining.multi_target import multi_target_rows

    with autocast(world, config.distributed):
        return multi_target_rows(*clean, config.masking, config.targets, state.teacher, received, training)


def resume(state: RunState, checkpoint: Checkpoint, world: World) -> None:
    """Restore step, data, targets and code counts. Raises UserError if the checkpoint has another quantizer."""
    if state.teacher:
        state.teacher.restore(checkpoint.extra_tensors, world.device)
    if state.adaptation:
        state.adaptation.restore(checkpoint.extra_tensors, checkpoint.path, world)
    for name, tensor in state.quantizer.state_dict().items():
        stored = checkpoint.extra_tensors.get(f"quantizer.{name}")
        if stored is None or not torch.equal(stored, tensor.cpu()):
            raise UserError(f"{checkpoint.path} has another quantizer: its {name} differs from that of quantizer.seed")
    state.step, state.data = checkpoint.step, DataState.from_dict(checkpoint.state.get("data", {}))
    if world.is_main:  # the saved counts are a sum over ranks, so only one rank continues them
        counts = checkpoint.extra_tensors.get("code_counts")
        if counts is None or counts.shape != state.code_counts.shape or counts.dtype != torch.int64:
            raise UserError(f"{checkpoint.path} has no counts of the codes: choose another checkpoint")
        state.code_counts += counts.to(world.device)


def save(
    state: RunState, run: RunFolder, config: Config, dataset: Dataset, world: World, writer: "BackgroundWriter"
) -> None:
    """Save a checkpoint and export the encoder, in the background; all ranks must call it."""
    from bestrq.training import checkpoint_saving  # not at the top: a reader of the loop need not read it

    assert state.data is not None
    writer.begin(state.step)
    features = {"features": dataset.features.to_dict(), "feature_hash": dataset.features.hash()}
    values = {"data": state.data.to_dict(), **features, "precision": config.distributed.precision}
    targets = {f"quantizer.{name}": tensor for name, tensor in state.quantizer.state_dict().items()}
    targets |= state.teacher.tensors() if state.teacher else {}
    tensors = targets | (state.adaptation.tensors(world) if state.adaptation else {})
    tensors["code_counts"] = world.sum(state.code_counts)
    snapshot = checkpoint_saving.take_snapshot(
        state.step, state.model, state.optimizer, values, world, tensors, config.checkpoint.file_gigabytes,
        kept=("model", "extra"),  # for the export
    )  # fmt: skip
    checkpoint_saving.submit_checkpoint(writer, run.checkpoints, snapshot)
    if world.is_main:
        from bestrq.pretraining import keep_best
        from bestrq.pretraining.export import export_encoder, model_card  # only the main process exports

        description = {
            "kind": "pretrained",
            "step": state.step,
            "encoder": to_dict(unwrap(state.model).get_submodule("encoder").settings),
            "quantizer": to_dict(config.quantizer),
            "targets": to_dict(config.targets),
            **features,
            "normalisation": config.data.normalisation,
            "std_floor": STD_FLOOR,
        }
        rows = f"{config.data.rows} rows of\n{config.data.row_frames} mel frames"
        card = model_card(description, f"{rows}, on `{dataset.location}` (fingerprint `{dataset.fingerprint}`)")
        exported = {name: snapshot.tensors["extra"][name] for name in targets}
        changes = config.quantizer.pca_steps, *config.quantizer.refine_steps
        writer.submit(keep_best.prune, run, config.checkpoint, state.step, changes)
        writer.submit(export_encoder, run.export, snapshot.tensors["model"], exported, description, card)
