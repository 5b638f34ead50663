"""Initialisation of fine-tuning from a pretrained encoder."""

from dataclasses import replace

import torch

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.model.settings import FREE_ENCODER_FIELDS
from bestrq.training.checkpoint import misfits
from bestrq.training.export_reading import Export, read_trained
from common.config import from_dict, to_dict
from common.errors import UserError
from data.features import FeatureSettings, difference
from data.format.dataset import Dataset
from pipelines.finetuning import FinetuneConfig


def read_init(config: FinetuneConfig, dataset: Dataset) -> Export:
    """Read the encoder of `finetune.init`.

    Raises UserError, which lists the differences, if it does not fit the settings or the dataset.
    """
    pretrained = read_pretrained_encoder(config.finetune.init, config.encoder, config.finetune.drop_top_blocks)
    stored, normalisation = pretrained.config.get("normalisation"), config.data.normalisation
    differing = difference(dataset.features, FeatureSettings.from_dict(pretrained.config.get("features", {})))
    if stored != normalisation:
        differing.append(f"data.normalisation: {normalisation!r} != {stored!r}")
    if differing:
        raise UserError(
            f"finetune.init {config.finetune.init} does not fit the dataset and settings (this run != the export): "
            f"{differing}"
        )
    return pretrained


LAYER_SUM = "encoder.layer_sum.weight"


def read_pretrained_encoder(folder: str, settings: EncoderSettings, drop_top_blocks: int = 0) -> Export:
    """Read the encoder of an export or a checkpoint, with tensors named `encoder.*`.

    Args:
        settings: of the encoder to initialise.
        drop_top_blocks: top blocks of the export that it lacks.

    The weights of a weighted sum of layers are only read if the export has the same layers and such a sum.

    Raises:
        UserError: the folder cannot be read, or its encoder has other settings (`FREE_ENCODER_FIELDS` and `output` may
            differ) or tensors.
    """
    pretrained = read_trained(folder)
    # Parsed as EncoderSettings, so that a field that was added after the export was written gets its default.
    stored = to_dict(from_dict(EncoderSettings, pretrained.config.get("encoder", {})))
    wanted = to_dict(replace(settings, num_layers=settings.num_layers + drop_top_blocks))
    differing = [
        f"encoder.{name} is {value!r}, in the export {stored[name]!r}"
        for name, value in wanted.items()
        if name not in (*FREE_ENCODER_FIELDS, "output", "num_layers") and value != stored[name]
    ]
    if wanted["num_layers"] != stored["num_layers"]:
        differing.append(
            f"encoder.num_layers is {settings.num_layers}, in the export {stored['num_layers']}, of which "
            f"finetune.drop_top_blocks leaves out {drop_top_blocks}"
        )
    if differing:
        raise UserError(f"{folder} holds another encoder: {'; '.join(differing)}")
    tensors = {name: tensor for name, tensor in pretrained.tensors.items() if name.startswith("encoder.")}
    num_blocks = sum(stage.num_layers for stage in settings.stages)
    dropped = tuple(f"encoder.blocks.{number}." for number in range(num_blocks, num_blocks + drop_top_blocks))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(dropped)}
    if drop_top_blocks or settings.output == "last":
        tensors.pop(LAYER_SUM, None)
    with torch.device("meta"):
        expected = {f"encoder.{name}": tensor for name, tensor in ConformerEncoder(settings).state_dict().items()}
    if LAYER_SUM not in tensors:
        expected.pop(LAYER_SUM, None)
    if wrong := misfits(expected, tensors):
        raise UserError(f"{folder}: {len(wrong)} tensors do not fit its own settings: {wrong[0]}")
    return replace(pretrained, tensors=tensors)


def reinitialise_top_blocks(encoder: ConformerEncoder, num_blocks: int, seed: int) -> None:
    """Re-initialise the last `num_blocks` blocks with the encoder's own initialisation.

    The top blocks of a BEST-RQ encoder are specialised in predicting its codes. With few labels, fine-tuning from
    re-initialised top blocks can give lower error rates. The new weights depend only on the settings and the seed; the
    global random state is unchanged. Call it before wrapping in DDP or FSDP.

    Raises:
        UserError: `num_blocks` is negative or greater than the number of blocks.
    """
    if not 0 <= num_blocks <= len(encoder.blocks):
        raise UserError(
            f"finetune.reinitialise_top_blocks is {num_blocks}, but the encoder has {len(encoder.blocks)} blocks: "
            f"give 0 to {len(encoder.blocks)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = ConformerEncoder(encoder.settings)
    for block, fresh_block in zip(encoder.blocks[::-1][:num_blocks], fresh.blocks[::-1][:num_blocks], strict=True):
        block.load_state_dict(fresh_block.state_dict())
