"""Initialisation of fine-tuning from a pretrained encoder."""

from dataclasses import replace

import torch

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.model.settings import FREE_ENCODER_FIELDS
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
    pretrained = read_pretrained_encoder(config.finetune.init, config.encoder)
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


def read_pretrained_encoder(folder: str, settings: EncoderSettings) -> Export:
    """Read the encoder of an export or a checkpoint, with tensors named `encoder.*`.

    Raises:
        UserError: the folder cannot be read, or its encoder has other settings (`FREE_ENCODER_FIELDS` may differ) or
            tensors.
    """
    pretrained = read_trained(folder)
    # Parsed as EncoderSettings, so that a field that was added after the export was written gets its default.
    stored = to_dict(from_dict(EncoderSettings, pretrained.config.get("encoder", {})))
    differing = [
        f"encoder.{name} is {value!r}, in the export {stored[name]!r}"
        for name, value in to_dict(settings).items()
        if name not in FREE_ENCODER_FIELDS and value != stored[name]
    ]
    if differing:
        raise UserError(f"{folder} holds another encoder: {'; '.join(differing)}")
    tensors = {name: tensor for name, tensor in pretrained.tensors.items() if name.startswith("encoder.")}
    with torch.device("meta"):
        expected = {f"encoder.{name}": t.shape for name, t in ConformerEncoder(settings).state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    if wrong:
        raise UserError(f"{folder}: {len(wrong)} tensors do not fit its own settings, such as {wrong[0]}")
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
