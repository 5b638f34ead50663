"""Tables of docs/recipes.md: hours heard, FLOPs, memory, time and cost of the recipes in configs/, all by formula.

    python -m benchmarks.recipe_table                        # the tables of the page
    python -m benchmarks.recipe_table --utilisation 0.1      # with another assumption

Nothing is run on a GPU. FLOPs are counted by torch's counter on short rows of the real encoder, once with one and once
with two blocks, as a step is linear in rows and blocks; heads and losses are added by formula, and recomputation by
activation checkpointing is not counted. Memory is that of `pipelines.memory_formula`. Time is FLOPs / (utilisation x
peak) + bytes / rate of the network, without overlap.
"""

import argparse
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import print_figures
from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.pretraining.mask_shares import masked_share, target_share
from bestrq.pretraining.masking import MaskingSettings
from bestrq.pretraining.quantizer import QuantizerSettings
from bestrq.recognition.transducer import TransducerSettings
from bestrq.training.flops import GPU_PEAKS, count_flops
from bestrq.training.process import DistributedSettings
from bestrq.training.run_folder import RunSettings
from common.config import from_dict, load_yaml, run_main
from common.errors import UserError
from common.segments import Segments
from data.loading.loader import LoaderSettings
from pipelines import memory_formula as formula
from pipelines.finetuning import FinetuneSettings

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FRAMES_PER_SECOND = 100
ROW_FILL = 0.98
"""share of a row in segments, measured for utterances of 2 to 17 s (docs/benchmarks.md)"""
UTTERANCE_SECONDS = 15
"""length of the utterances of LibriSpeech and MLS, assumed for the cost of attention and of the transducer's lattice"""
LABELS_PER_SECOND = 4.0
"""labels of a transcript, assumed: 2.7 words per second of LibriSpeech, about 1.5 byte pairs each"""
CHARACTERS = 29
"""outputs with a tokenizer of English characters: letters, space, apostrophe, blank"""
CELL_BYTES = 64
"""memory of a cell of the lattice beside the slices of the joint network (docs/transducer.md: a few dozen bytes)"""
UTILISATION = 0.2
"""assumed share of the peak of bfloat16 products that a step reaches; not measured"""


@dataclass(frozen=True)
class Card:
    """GPU, with assumptions on price and network."""

    peak: float
    """FLOP/s of bfloat16 products, from the data sheet"""
    gigabytes: int
    """memory"""
    dollars: float
    """assumed price per hour"""
    node_rate: float
    """assumed bytes per second for gradients and weights within a node of 8"""
    network_rate: float
    """assumed bytes per second and GPU between nodes"""


CARDS = {
    "H100": Card(GPU_PEAKS["H100"], 80, dollars=2.5, node_rate=200e9, network_rate=40e9),
    "RTX 3090": Card(GPU_PEAKS["RTX 3090"], 24, dollars=0.25, node_rate=10e9, network_rate=1e9),
}

CORPORA = {"LibriSpeech": 960.0, "MLS": 50_688.0, "10 min": 1 / 6, "1 h": 1.0, "10 h": 10.0, "100 h": 100.0}
"""hours of training audio"""


@dataclass(frozen=True)
class Use:
    """Use of a recipe: corpus and GPUs."""

    recipe: str
    """name of a file in configs/, without .yaml"""
    corpus: str
    gpus: int
    card: str = "H100"
    accumulation: int = 1


USES = [
    Use("slim-55m", "LibriSpeech", 1, "RTX 3090"),
    Use("bestrq-94m", "LibriSpeech", 8),
    Use("base-120m", "MLS", 8),
    Use("base-120m", "MLS", 32),
    Use("fast-115m", "MLS", 8),
    Use("large-600m", "MLS", 16),
    Use("large-600m", "MLS", 64),
    Use("slim-55m-rnnt", "LibriSpeech", 1, "RTX 3090"),
    Use("base-120m-10min-ctc", "10 min", 1),
    Use("base-120m-1h-ctc", "1 h", 1),
    Use("base-120m-10h-ctc", "10 h", 1),
    Use("base-120m-100h-ctc", "100 h", 8),
    Use("base-120m-ctc", "LibriSpeech", 8),
    Use("base-120m-rnnt", "LibriSpeech", 8),
    Use("fast-115m-ctc", "LibriSpeech", 8),
    Use("fast-115m-rnnt", "LibriSpeech", 8),
    Use("large-600m-rnnt", "LibriSpeech", 8),
]


@dataclass(frozen=True)
class Recipe:
    """Settings of a recipe that determine its cost."""

    run: RunSettings
    data: LoaderSettings
    encoder: EncoderSettings
    distributed: DistributedSettings
    quantizer: QuantizerSettings | None
    """of pretraining; None for fine-tuning"""
    masking: MaskingSettings
    finetune: FinetuneSettings
    transducer: TransducerSettings | None

    @property
    def target_share(self) -> float:
        """Share of encoder frames with a target of BEST-RQ, far from the edges of a segment."""
        span = self.masking.span_ms * FRAMES_PER_SECOND // 1000
        return target_share(self.masking.start_probability, span, self.encoder.stride)

    @property
    def vocab_size(self) -> int:
        """Outputs of a recogniser, blank included."""
        return CHARACTERS if self.finetune.tokenizer == "char" else self.finetune.vocab_size

    @property
    def seconds(self) -> float:
        """Seconds of rows per step."""
        return self.data.rows * self.data.row_frames / FRAMES_PER_SECOND


def read_recipe(name: str) -> Recipe:
    """Parse `configs/NAME.yaml`, by the sections that determine the cost."""
    values = load_yaml(CONFIGS / f"{name}.yaml")

    def section(settings: type[Any], key: str) -> Any:
        return from_dict(settings, values.get(key, {}))

    pretraining = "finetune" not in values
    return Recipe(
        section(RunSettings, "run"),
        section(LoaderSettings, "data"),
        section(EncoderSettings, "encoder"),
        section(DistributedSettings, "distributed"),
        section(QuantizerSettings, "quantizer") if pretraining else None,
        section(MaskingSettings, "masking"),
        section(FinetuneSettings, "finetune"),
        section(TransducerSettings, "transducer") if "transducer" in values else None,
    )


# ---- FLOPs ----


def encoder_flops(settings: EncoderSettings, frames: int) -> float:
    """FLOPs of a forward pass of the encoder for one segment of `frames` mel frames, from one and from two blocks."""
    frames = frames // settings.row_multiple * settings.row_multiple
    segments = Segments(torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), frames), frames)
    counts = []
    for num_layers in (1, 2):
        encoder = ConformerEncoder(replace(settings, num_layers=num_layers)).eval()
        counts.append(count_flops(partial(_encode, encoder, segments)) / 3)  # the counter adds a backward pass
    return counts[0] + (settings.num_layers - 1) * (counts[1] - counts[0])


def _encode(encoder: ConformerEncoder, segments: Segments) -> torch.Tensor:
    log_mel = torch.zeros(1, segments.num_frames, encoder.settings.num_mels)
    return encoder(log_mel, encoder.layout(segments))


def head_flops(recipe: Recipe, frames: int) -> float:
    """FLOPs of forward and backward pass of heads and losses for one utterance of `frames` mel frames.

    The transducer computes the outputs of the joint network a second time in its backward pass.
    """
    dim, num_frames, vocab_size = recipe.encoder.dim, frames / recipe.encoder.stride, recipe.vocab_size
    if recipe.quantizer is not None:
        codes = recipe.quantizer.num_codebooks * recipe.quantizer.codebook_size
        return 6.0 * num_frames * recipe.target_share * dim * codes
    settings = recipe.transducer
    if settings is None:
        return 6.0 * num_frames * dim * vocab_size
    labels, width = frames / FRAMES_PER_SECOND * LABELS_PER_SECOND, settings.joint_dim
    states = min(settings.prune_range or labels + 1, labels + 1)
    projections = 6.0 * width * (num_frames * dim + labels * settings.prediction_dim)
    joint = 8.0 * num_frames * states * width * vocab_size
    ctc = 6.0 * num_frames * dim * vocab_size if settings.ctc_weight else 0.0
    # The joint network without a hidden layer: a projection per frame and per label, and a product of both.
    simple = num_frames * dim + labels * settings.prediction_dim + num_frames * labels if settings.prune_range else 0.0
    return projections + joint + ctc + 6.0 * simple * vocab_size


@cache
def run_flops(name: str) -> float:
    """FLOPs of all steps of a recipe; a frozen encoder has no backward pass."""
    recipe = read_recipe(name)
    frames = int(UTTERANCE_SECONDS * FRAMES_PER_SECOND)
    encoder, head = encoder_flops(recipe.encoder, frames) / frames, head_flops(recipe, frames) / frames
    frozen = recipe.finetune.freeze_encoder_steps
    per_frame = frozen * (encoder + head) + (recipe.run.steps - frozen) * (3 * encoder + head)
    return per_frame * recipe.seconds * FRAMES_PER_SECOND


# ---- Memory and network ----


def head_parameters(recipe: Recipe) -> int:
    """Number of parameters outside the encoder, without those of the transducer's prediction network."""
    dim, settings = recipe.encoder.dim, recipe.transducer
    if recipe.quantizer is not None:
        return dim * recipe.quantizer.num_codebooks * recipe.quantizer.codebook_size
    if settings is None:
        return dim * recipe.vocab_size
    widths = settings.joint_dim + settings.prediction_dim + (dim if settings.ctc_weight else 0)
    return settings.joint_dim * (dim + settings.prediction_dim) + widths * recipe.vocab_size


def memory_bytes(recipe: Recipe, use: Use) -> float:
    """Peak of a GPU, by `memory_formula`. Raises UserError if the rows cannot be divided among the GPUs."""
    rows, remainder = divmod(recipe.data.rows, use.gpus * use.accumulation)
    if remainder:
        raise UserError(
            f"configs/{use.recipe}.yaml: data.rows is {recipe.data.rows}: give a multiple of {use.gpus} GPUs x "
            f"accumulation {use.accumulation}"
        )
    settings, batch = recipe.encoder, formula.Rows(rows, recipe.data.row_frames)
    shards = use.gpus if recipe.distributed.strategy == "fsdp" else 1
    lattice = 0.0
    if recipe.quantizer is not None:
        logits = recipe.target_share * recipe.quantizer.num_codebooks * recipe.quantizer.codebook_size
    else:
        logits = float(recipe.vocab_size)
    if recipe.transducer is not None:
        labels = UTTERANCE_SECONDS * LABELS_PER_SECOND
        lattice = recipe.transducer.slice_bytes + CELL_BYTES * rows * recipe.data.row_frames / settings.stride * labels
    dense = settings.backend == "sdpa" and settings.mask == "segment"
    mode = settings.activation_checkpointing
    activations = formula.activation_bytes(settings, batch, mode, shards, dense, logits)
    return formula.weight_bytes(settings, shards, head_parameters(recipe) // settings.dim) + activations + lattice


def network_seconds(recipe: Recipe, use: Use) -> float:
    """Seconds per step of the transfers of a GPU: 8 bytes per parameter in a ring.

    DDP reduces float32 gradients, FSDP2 gathers bfloat16 weights twice and reduces float32 gradients per micro-batch.
    """
    card = CARDS[use.card]
    parameters = formula.num_parameters(recipe.encoder) + head_parameters(recipe)
    rounds = use.accumulation if recipe.distributed.strategy == "fsdp" else 1
    rate = card.node_rate if use.gpus <= 8 else card.network_rate
    return rounds * 8.0 * parameters * (use.gpus - 1) / use.gpus / rate


# ---- Tables ----


def duration(hours: float) -> str:
    """Hours with two significant digits, or minutes below one hour."""
    return f"{hours:.0f} h" if hours >= 9.95 else f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"


def dollars(cost: float) -> str:
    """Cost with cents below 10 USD."""
    return f"{cost:,.{0 if cost >= 10 else 2}f} USD"


def cost_row(use: Use, utilisation: float) -> list[str]:
    """Cells of a line of the tables of cost."""
    recipe, card = read_recipe(use.recipe), CARDS[use.card]
    steps, flops = recipe.run.steps, run_flops(use.recipe)
    heard = steps * recipe.seconds * ROW_FILL / 3600
    passes = heard / CORPORA[use.corpus]
    compute, network = flops / steps / (use.gpus * card.peak * utilisation), network_seconds(recipe, use)
    hours = steps * (compute + network) / 3600
    accumulation = f", accumulation {use.accumulation}" if use.accumulation > 1 else ""
    return [
        f"`{use.recipe}`",
        f"{use.gpus} x {use.card}{accumulation}",
        f"{recipe.seconds:,.0f} s",
        f"{steps:,}",
        f"{heard:,.0f} h, {passes:,.{0 if passes >= 10 else 1}f} x {use.corpus}",
        f"{flops:.1e}",
        f"{memory_bytes(recipe, use) / 1e9:.0f} GB",
        f"{1000 * compute:.0f} + {1000 * network:.0f} ms",
        duration(hours),
        dollars(hours * use.gpus * card.dollars),
    ]


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


def target_table() -> str:
    """Masks and targets of the recipes of pretraining."""
    rows = []
    for name in dict.fromkeys(use.recipe for use in USES if read_recipe(use.recipe).quantizer is not None):
        recipe = read_recipe(name)
        assert recipe.quantizer is not None
        masking, span = recipe.masking, recipe.masking.span_ms * FRAMES_PER_SECOND // 1000
        encoder, heads = formula.num_parameters(recipe.encoder), head_parameters(recipe)
        rows.append(
            [
                f"`{name}`",
                f"{encoder / 1e6:.0f} + {heads / 1e6:.0f} M",
                f"{10 * recipe.encoder.stride} ms",
                f"{recipe.quantizer.num_codebooks} x {recipe.quantizer.codebook_size:,}",
                f"{masking.span_ms} ms, {masking.start_probability:g}",
                f"{100 * masked_share(masking.start_probability, span):.0f} %",
                f"{100 * recipe.target_share:.0f} %",
            ]
        )
    heads_line = ["Recipe", "Encoder + heads", "Frame", "Codes", "Spans, start probability", "Masked", "With a target"]
    return markdown(heads_line, rows)


def tables(utilisation: float = UTILISATION) -> str:
    """The three tables of docs/recipes.md."""
    heads = [
        "Recipe",
        "GPUs",
        "Audio per step",
        "Steps",
        "Heard",
        "FLOPs",
        "Memory per GPU",
        "Compute + network per step",
    ]
    heads += ["Time", "Cost"]
    parts = []
    for title, pretraining in (("Pretraining", True), ("Fine-tuning", False)):
        uses = [use for use in USES if (read_recipe(use.recipe).quantizer is not None) == pretraining]
        parts.append(f"{title}:\n\n{markdown(heads, [cost_row(use, utilisation) for use in uses])}")
    return "\n\n".join([f"Targets of pretraining:\n\n{target_table()}", *parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utilisation", type=float, default=UTILISATION, help="share of the peak of bfloat16 products")
    arguments = parser.parse_args()
    if not 0 < arguments.utilisation <= 1:
        raise UserError(f"--utilisation is {arguments.utilisation}: give a share above 0, at most 1")
    print(tables(arguments.utilisation))
    flops = {use.recipe: run_flops(use.recipe) for use in USES}
    print_figures({"utilisation": arguments.utilisation, "flops": flops}, "bfloat16")


if __name__ == "__main__":
    run_main(main)
