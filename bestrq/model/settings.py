"""Settings of the Conformer encoder: fields, checks and derived sizes."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from common.errors import UserError

FREE_ENCODER_FIELDS = (
    *("dropout", "attention_dropout", "layer_drop", "activation_checkpointing", "backend", "compile", "residual"),
    *("mask", "window", "chunk_size", "left_chunks", "dynamic_chunks", "rotary_interpolation"),
)
"""fields that may change between pretraining and fine-tuning, as no weight depends on them"""


CheckpointingMode = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class StageSettings:
    """A stage before the last: blocks at a higher frame rate, halved by the last of them."""

    num_layers: PositiveInt = 5
    """Conformer blocks"""
    dim: PositiveInt = 120
    """model width D"""
    num_heads: PositiveInt = 4
    """attention heads"""
    feedforward_dim: PositiveInt = 480
    """hidden width of the feed-forward modules"""
    group_size: PositiveInt = 1
    """neighbouring frames that attention groups into one"""


@dataclass(frozen=True)
class EncoderSettings:
    """Architecture of a Conformer encoder; `bestrq.model.presets` has named architectures."""

    num_mels: PositiveInt = 80
    """mel bins of the input"""
    dim: PositiveInt = 144
    """model width D (of the last stage; only an Efficient Conformer has others)"""
    num_layers: PositiveInt = 6
    """Conformer blocks (of the last stage)"""
    num_heads: PositiveInt = 4
    """attention heads; a divisor of dim. With rotary positions, dim / num_heads must be even"""
    num_kv_heads: NonNegativeInt = 0
    """key and value heads, each shared by several query heads (grouped-query attention); 0 for num_heads"""
    feedforward_dim: PositiveInt = 576
    """hidden width of the two feed-forward modules of a block"""
    feedforward: Literal["silu", "swiglu"] = "silu"
    """activation of the feed-forward modules; 'swiglu' adds a gate and 50 % more parameters"""
    earlier_stages: list[StageSettings] = field(default_factory=list)
    """stages before the last, each of which halves the frame rate (Efficient Conformer)"""
    group_size: PositiveInt = 1
    """neighbouring frames that attention groups into one (grouped attention of the Efficient Conformer)"""
    kernel_size: PositiveInt = 15
    """encoder frames per output of the depthwise convolution; odd"""
    causal_convolution: bool = False
    """no look-ahead in convolutions, including those of the subsampling: for streaming"""
    convolution_norm: Literal["layer_norm", "rms_norm", "batch_norm"] = "layer_norm"
    """norm inside the convolution module; the statistics of 'batch_norm' cover the valid frames of all processes"""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """all other norms"""
    subsampling: Literal["convolutional", "striding", "stacking"] = "convolutional"
    """'convolutional' (factor 4), 'striding' (FastConformer's depthwise; 2, 4, 8) or 'stacking' (2, 4, 8)"""
    subsampling_factor: int = 4
    """mel frames per frame of the first stage"""
    subsampling_channels: PositiveInt = 64
    """channels of the subsampling convolutions"""
    mask: Literal["segment", "window", "causal", "chunk"] = "segment"
    """frames that a frame attends to; 'segment': all frames of its segment"""
    window: PositiveInt = 128
    """mask 'window': frames of the first stage on each side"""
    chunk_size: PositiveInt = 16
    """mask 'chunk': frames of the first stage per chunk"""
    left_chunks: int = 4
    """mask 'chunk': earlier chunks that a frame attends to; -1 for all"""
    dynamic_chunks: bool = False
    """mask 'chunk': in training, the entire segment with probability 1/2, else a random chunk size up to chunk_size"""
    position: Literal["rotary", "relative", "fourier", "none"] = "rotary"
    """positions in attention: 'relative' is a learned bias per head and distance, 'fourier' learned features of the
    position, added once before the blocks"""
    rotary_theta: PositiveFloat = 1.5e6
    """wavelength base of the rotary positions. Angles grow by theta^(-2i/d) per frame. At 1.5e6 the slower half of the
    pairs completes no turn within minutes, and the slowest stays within 0.1 rad over an hour (90,000 encoder frames):
    lengths beyond those of pretraining stay within its range of angles"""
    rotary_interpolation: PositiveFloat = 1.0
    """divisor of rotary positions, to keep longer segments within the angles of shorter ones"""
    relative_buckets: PositiveInt = 64
    """position 'relative': learned values per head; half per direction, half of those for single distances"""
    relative_max_distance: PositiveInt = 800
    """position 'relative': frames from which on all distances share the last bucket"""
    output: Literal["last", "weighted_sum"] = "last"
    """output of the encoder: that of the last block, or a learned weighted sum of all blocks (SUPERB)"""
    dropout: float = 0.1
    """dropout probability on every residual branch and inside the feed-forward modules"""
    attention_dropout: float = 0.1
    """dropout probability of attention weights"""
    layer_drop: float = 0.0
    """probability that a row skips a block in training; saves no time, as all processes must run the same blocks"""
    activation_checkpointing: CheckpointingMode = "none"
    """recomputation in the backward pass: 'selective' of cheap operations, 'full' of everything inside a block"""
    backend: Literal["sdpa", "flex", "varlen"] = "sdpa"
    """attention on CUDA: scaled_dot_product_attention, compiled FlexAttention, or flash attention by segment; the last
    two without attention_dropout. 'varlen' needs mask 'segment', 'window' or 'causal' without relative positions, and
    is 'sdpa' in float32. A CPU always loops over segments"""
    residual: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of the residual stream under autocast to bfloat16 (docs/gpu.md has the errors); auto: that of the
    device's norms, float32 on CUDA and bfloat16 on a CPU"""
    compile: Literal["auto", True, False] = "auto"
    """compilation of the blocks for training; auto: on CUDA, where Triton's C compiler is there and convolution_norm is
    not 'batch_norm'; true: on a CPU as well, by g++ and with 'sdpa', for tests"""

    @property
    def stages(self) -> list["EncoderSettings"]:
        """Settings of each stage, first to last; only widths and counts differ."""
        earlier = [replace(self, earlier_stages=[], **asdict(stage)) for stage in self.earlier_stages]
        return [*earlier, replace(self, earlier_stages=[])]

    @property
    def group_sizes(self) -> list[int]:
        """Group size of each stage."""
        return [*(stage.group_size for stage in self.earlier_stages), self.group_size]

    @property
    def stride(self) -> int:
        """Mel frames per output frame, and per BEST-RQ target."""
        return self.subsampling_factor << len(self.earlier_stages)

    @property
    def row_multiple(self) -> int:
        """Mel frames of which row lengths and segment starts are multiples, so that no group spans two segments."""
        groups = (group_size << number for number, group_size in enumerate(self.group_sizes))
        return math.lcm(self.stride, *(self.subsampling_factor * group for group in groups))

    @property
    def row_gap(self) -> int:
        """Mel frames between two segments of a row: the reach of the subsampling convolutions, rounded up."""
        return self.subsampling_factor

    @property
    def head_dim(self) -> int:
        """Width of an attention head, d."""
        return self.dim // self.num_heads * self.group_size

    def __post_init__(self) -> None:
        """Raise UserError for incompatible fields, and for ranges that no type expresses."""
        factors = (4,) if self.subsampling == "convolutional" else (2, 4, 8)
        _require(
            self.dim % self.num_heads == 0 and (self.position != "rotary" or self.head_dim % 2 == 0),
            "num_heads", self.num_heads,
            f"give a divisor of dim = {self.dim}; with rotary positions, dim / num_heads must be even",
        )  # fmt: skip
        _require(
            self.num_kv_heads == 0 or self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads", self.num_kv_heads, f"give 0, or a divisor of num_heads = {self.num_heads}",
        )  # fmt: skip
        _require(self.kernel_size % 2 == 1, "kernel_size", self.kernel_size, "give an odd number")
        _require(
            self.subsampling_factor in factors, "subsampling_factor", self.subsampling_factor,
            f"give {' or '.join(map(str, factors))} with subsampling {self.subsampling!r}",
        )  # fmt: skip
        for name in ("dropout", "attention_dropout", "layer_drop"):
            _require(0.0 <= getattr(self, name) < 1.0, name, getattr(self, name), "give 0 or more, below 1")
        _require(self.left_chunks >= -1, "left_chunks", self.left_chunks, "give 0 or more, or -1 for all")
        _require(
            self.relative_buckets % 4 == 0 and self.relative_buckets >= 8,
            "relative_buckets", self.relative_buckets, "give a multiple of 4, at least 8",
        )  # fmt: skip
        _require(
            self.relative_max_distance > self.relative_buckets // 4,
            "relative_max_distance", self.relative_max_distance,
            f"give more than relative_buckets / 4 = {self.relative_buckets // 4}",
        )  # fmt: skip
        _require(
            self.backend == "sdpa" or self.attention_dropout == 0,
            "attention_dropout", self.attention_dropout, f"backend {self.backend!r} has no dropout: give 0",
        )  # fmt: skip
        if self.backend == "varlen":
            fix = "give another value, or backend 'flex'"
            _require(self.mask != "chunk", "mask", self.mask, f"backend 'varlen' has no chunks: {fix}")
            _require(self.position != "relative", "position", self.position, f"backend 'varlen' has no bias: {fix}")
            _require(
                self.head_dim % 8 == 0 and self.head_dim <= 256, "num_heads", self.num_heads,
                f"backend 'varlen' needs heads of a multiple of 8 and at most 256, not {self.head_dim}: {fix}",
            )  # fmt: skip
        _require(
            self.convolution_norm != "batch_norm" or self.activation_checkpointing == "none",
            "activation_checkpointing", self.activation_checkpointing,
            "it would update the statistics of convolution_norm 'batch_norm' twice: give 'none', or another norm",
        )  # fmt: skip
        _require(
            not self.dynamic_chunks or self.mask == "chunk",
            "dynamic_chunks", self.dynamic_chunks, "give false, or mask 'chunk'",
        )  # fmt: skip
        _require(
            self.mask != "causal" or max(self.group_sizes) == 1,
            "group_size", max(self.group_sizes), "frames of a group attend to each other: give 1 with mask 'causal'",
        )  # fmt: skip
        _require(
            self.output == "last" or not self.earlier_stages,
            "output", self.output, "stages have different frame rates: give 'last' with earlier_stages",
        )  # fmt: skip
        name = "window" if self.mask == "window" else "chunk_size"
        for stage, group_size in enumerate(self.group_sizes if self.mask in ("window", "chunk") else []):
            _require(
                getattr(self, name) % (group_size << stage) == 0, name, getattr(self, name),
                f"give a multiple of {group_size << stage}, first-stage frames per attention frame in stage {stage}",
            )  # fmt: skip
        try:
            if self.earlier_stages:
                _ = self.stages  # checks every stage
        except UserError as error:
            raise UserError(f"encoder.earlier_stages: {error}") from None


def _require(ok: bool, name: str, value: object, fix: str) -> None:
    if not ok:
        raise UserError(f"encoder.{name}: {value!r} is invalid: {fix}")
