"""Teacher of pretraining: the model of an export, checked against the student and the dataset."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.pretraining.objective import TargetSettings
from bestrq.pretraining.teacher import Teacher
from bestrq.training.export_reading import Export
from bestrq.training.process import World
from common.config import from_dict
from common.errors import UserError
from common.segments import Segments
from data.features import FeatureSettings, difference
from data.format.dataset import Dataset, Normalisation
from data.loading.heldout import HeldoutSettings, heldout_batches
from data.loading.loader import LoaderSettings
from pipelines.run_weights import hash_of_weights, read_trained


def open_teacher(
    targets: TargetSettings, student: EncoderSettings, data: LoaderSettings, dataset: Dataset, world: World
) -> Teacher:
    """Teacher of `targets.export`, on the device, without clusters. The global random state is unchanged.

    Raises UserError if it does not fit the student's rows, the features or `targets`.
    """
    export = read_trained(targets.export)
    teacher = read_teacher(targets, export, dataset, data.normalisation, world)
    settings = teacher.encoder.settings
    place = f"targets.export {targets.export}"
    if settings.stride != student.stride:
        raise UserError(
            f"{place} has a stride of {settings.stride} mel frames, the encoder of this run {student.stride}: a target "
            "belongs to one encoder frame; give a teacher of the same stride, or change encoder.subsampling_factor"
        )
    if student.row_multiple % settings.row_multiple or settings.subsampling_factor // 2 > student.row_gap:
        raise UserError(
            f"{place} needs segments at multiples of {settings.row_multiple} mel frames and gaps of "
            f"{settings.subsampling_factor // 2}; the rows of this encoder have {student.row_multiple} and "
            f"{student.row_gap}: change encoder.subsampling or group_size, or give another teacher"
        )
    return teacher


def read_teacher(
    targets: TargetSettings, export: Export, dataset: Dataset, normalisation: Normalisation, world: World
) -> Teacher:
    """Teacher of an export, on the device, without clusters. The global random state is unchanged.

    Raises UserError if it does not fit the features, their normalisation or `targets`.
    """
    place = f"targets.export {targets.export}"
    differing = difference(dataset.features, FeatureSettings.from_dict(export.config.get("features", {})))
    stored = export.config.get("normalisation")
    if stored != normalisation:
        differing.append(f"data.normalisation: {normalisation!r} != {stored!r}")
    if differing:
        raise UserError(f"{place} does not fit the dataset and settings (this run != the export): {differing}")
    settings = replace(from_dict(EncoderSettings, export.config.get("encoder", {})), activation_checkpointing="none")
    with torch.random.fork_rng(devices=[]):
        encoder = ConformerEncoder(settings)
    tensors = {
        name.removeprefix("encoder."): tensor for name, tensor in export.tensors.items() if name.startswith("encoder.")
    }
    try:
        encoder.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{place}: its tensors do not fit its own settings: {error}") from error
    encoder.to(world.device).eval().requires_grad_(False)
    fingerprint = hash_of_weights(export.path)
    if targets.kind == "clusters":
        layer = _layer(targets.layer, encoder, place)
        return Teacher(encoder, layer, targets.clusters, fingerprint)
    weight, bias = (tensor.to(world.device) for tensor in _ctc_head(export, targets.kind))
    return Teacher(
        encoder,
        len(encoder.blocks),
        len(weight),
        fingerprint,
        head=(weight, bias),
        soft=targets.kind == "ctc_posteriors",
        fill=targets.blank == "fill",
        exclude_blank=targets.blank == "without",
    )


def _layer(layer: int, encoder: ConformerEncoder, place: str) -> int:
    first, last = encoder.first_full_block, len(encoder.blocks)
    if layer == 0:
        return max(first, round(last * 2 / 3))
    if not first <= layer <= last:
        raise UserError(f"targets.layer is {layer}: the blocks of {place} with its output rate are {first} to {last}")
    return layer


def _ctc_head(export: Export, kind: str) -> tuple[Tensor, Tensor]:
    for name in ("head", "ctc_head"):
        if f"{name}.weight" in export.tensors:
            return export.tensors[f"{name}.weight"].float(), export.tensors[f"{name}.bias"].float()
    raise UserError(
        f"targets.kind is {kind!r}, but {export.path} has no CTC head: give an export of finetune_ctc.py, one of "
        "finetune_rnnt.py with transducer.ctc_weight above 0, or kind 'clusters'"
    )


def sample_rows(
    targets: TargetSettings, data: LoaderSettings, dataset: Dataset, recordings: np.ndarray, student: EncoderSettings,
    world: World,
) -> list[tuple[Tensor, Segments]]:  # fmt: skip
    """Rows of up to `targets.cluster_seconds` of training audio, drawn by `targets.seed`: the same for any world.

    Rank 0 reads them; [] on the others.
    """
    if not world.is_main:
        return []
    sample = HeldoutSettings(max_seconds=targets.cluster_seconds, seed=targets.seed)
    batches = heldout_batches(
        dataset,
        recordings,
        data,
        sample,
        multiple=student.row_multiple,
        row_gap=student.row_gap,
        rank=0,
        world_size=1,
        accumulation=data.rows,  # one row at a time
        draw_mask=_no_mask,
    )
    return [(batch.log_mel, batch.segments) for batch in batches]


def _no_mask(generator: np.random.Generator, frames: int) -> np.ndarray:
    return np.zeros(frames, dtype=bool)
