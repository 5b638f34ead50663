"""Initialisation of fine-tuning from a pretrained encoder."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.model.settings import FREE_ENCODER_FIELDS
from bestrq.training.export_reading import Export
from bestrq.training.process import World
from bestrq.training.tensor_slots import misfits
from common.config import from_dict, to_dict
from common.errors import UserError
from data.features import FeatureSettings, difference
from data.format.dataset import Dataset
from pipelines.finetuning import FinetuneConfig
from pipelines.run_weights import read_trained


@dataclass(frozen=True)
class Pretrained(Export):
    """Encoder of an export or a checkpoint, with tensors named `encoder.*`."""

    left_out: dict[str, str] = field(default_factory=dict)
    """reason by name of the other tensors of the export or checkpoint"""


def read_init(config: FinetuneConfig, dataset: Dataset) -> Pretrained:
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


def read_pretrained_encoder(folder: str, settings: EncoderSettings, drop_top_blocks: int = 0) -> Pretrained:
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
    left_out = _left_out(pretrained, settings, drop_top_blocks)
    tensors = {name: tensor for name, tensor in pretrained.tensors.items() if name not in left_out}
    with torch.device("meta"):
        expected = {f"encoder.{name}": tensor for name, tensor in ConformerEncoder(settings).state_dict().items()}
    if LAYER_SUM not in tensors:
        expected.pop(LAYER_SUM, None)
    if wrong := misfits(expected, tensors):
        raise UserError(f"{folder}: {len(wrong)} tensors do not fit its own settings: {wrong[0]}")
    return Pretrained(pretrained.path, tensors, pretrained.config, left_out)


def _left_out(pretrained: Export, settings: EncoderSettings, drop_top_blocks: int) -> dict[str, str]:
    """Tensors that are not read, with the reason."""
    num_blocks = sum(stage.num_layers for stage in settings.stages)
    dropped = tuple(f"encoder.blocks.{number}." for number in range(num_blocks, num_blocks + drop_top_blocks))
    reasons = {}
    for name in pretrained.tensors:
        if not name.startswith("encoder."):
            reasons[name] = "only the encoder is used"
        elif name.startswith(dropped):
            reasons[name] = f"finetune.drop_top_blocks is {drop_top_blocks}"
        elif name == LAYER_SUM and settings.output == "last":
            reasons[name] = "encoder.output is 'last'"
        elif name == LAYER_SUM and drop_top_blocks:
            reasons[name] = f"its layers are others: finetune.drop_top_blocks is {drop_top_blocks}"
    return reasons


def initialise(model: nn.Module, init: Pretrained, config: FinetuneConfig, world: World) -> None:
    """Load the encoder into a recogniser, re-initialise its top blocks, and print which tensors were used, on rank 0.

    Call it before wrapping in DDP or FSDP.
    """
    model.load_state_dict(init.tensors, strict=False)  # `read_init` has checked that the encoder is complete
    encoder = model.get_submodule("encoder")
    assert isinstance(encoder, ConformerEncoder)
    reinitialise_top_blocks(encoder, config.finetune.reinitialise_top_blocks, config.run.seed)
    if world.is_main:
        print(account(model.state_dict(), init, len(encoder.blocks), config), flush=True)


def account(tensors: Mapping[str, Tensor], init: Pretrained, num_blocks: int, config: FinetuneConfig) -> str:
    """Lines with the tensors of the model that come from `finetune.init`, the fresh ones and those left out, with the
    reasons.

    Args:
        tensors: of the model, by name.
        num_blocks: of its encoder.
    """
    count = config.finetune.reinitialise_top_blocks
    top = tuple(f"encoder.blocks.{number}." for number in range(num_blocks - count, num_blocks))
    fresh = {name: f"finetune.reinitialise_top_blocks is {count}" for name in tensors if name.startswith(top)}
    fresh |= {name: "not in finetune.init" for name in tensors if name not in init.tensors}
    matched = [tensor for name, tensor in tensors.items() if name not in fresh]
    millions = sum(tensor.numel() for tensor in matched) / 1e6
    lines = [
        f"finetune.init {config.finetune.init}, a {init.config.get('kind', 'pretrained')} model: matched "
        f"{len(matched)} of the {len(tensors)} tensors of this model, {millions:.1f} M values"
    ]
    for title, reasons in (("fresh", fresh), ("left out", init.left_out)):
        modules: dict[tuple[str, str], int] = {}
        for name, reason in reasons.items():
            module = ".".join(name.split(".")[: 3 if name.startswith("encoder.blocks.") else 1])
            module = name if name == LAYER_SUM else module
            modules[module, reason] = modules.get((module, reason), 0) + 1
        lines += [f"    {title}: {module} ({number}): {reason}" for (module, reason), number in modules.items()]
    return "\n".join(lines)


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
