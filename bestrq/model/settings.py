"""What an encoder is made of."""

import math
from dataclasses import dataclass, field, replace

from common.errors import UserError

FREE_ENCODER_FIELDS = (
    *("dropout", "attention_dropout", "layer_drop", "activation_checkpointing", "backend"),
    *("mask", "window", "chunk_size", "left_chunks", "dynamic_chunks", "rotary_interpolation"),
)
"""fields that may change between pretraining and fine-tuning: no weight depends on them"""


def _require(ok: bool, name: str, value: object, fix: str) -> None:
    if not ok:
        raise UserError(f"encoder.{name}: {value!r} is not possible: {fix}")


@dataclass(frozen=True)
class StageSettings:
    """A stage before the last: blocks at a higher frame rate, which the last of them halves."""

    num_layers: int = 5
    """Conformer blocks"""
    dim: int = 120
    """model width D"""
    num_heads: int = 4
    """attention heads"""
    feedforward_dim: int = 480
    """hidden width of the feed-forward modules"""
    group_size: int = 1
    """neighbouring frames that attention takes as one"""


@dataclass(frozen=True)
class EncoderSettings:
    """Shape of a Conformer encoder. `bestrq.model.presets` holds named ones."""

    num_mels: int = 80
    """mel bins of the input"""
    dim: int = 144
    """model width D (of the last stage, which is all there is but in an Efficient Conformer)"""
    num_layers: int = 6
    """Conformer blocks (of the last stage)"""
    num_heads: int = 4
    """attention heads; they divide dim into heads of a whole width, even with rotary positions"""
    num_kv_heads: int = 0
    """heads of keys and values, each shared by as many query heads (grouped-query attention); 0 for num_heads"""
    feedforward_dim: int = 576
    """hidden width of the two feed-forward modules of a block"""
    feedforward: str = "silu"
    """'silu', or 'swiglu', whose gate makes it half as large again"""
    earlier_stages: list[StageSettings] = field(default_factory=list)
    """stages before the last, each of which halves the frame rate (Efficient Conformer)"""
    group_size: int = 1
    """neighbouring frames that attention takes as one (grouped attention of the Efficient Conformer)"""
    kernel_size: int = 15
    """encoder frames that the depthwise convolution sees; odd"""
    causal_convolution: bool = False
    """convolutions, those of the subsampling too, see no later frame: for streaming"""
    convolution_norm: str = "layer_norm"
    """norm inside the convolution module: 'layer_norm', 'rms_norm' or 'batch_norm', whose statistics leave padding out
    and are those of all processes together"""
    norm: str = "layer_norm"
    """all other norms: 'layer_norm' or 'rms_norm'"""
    subsampling: str = "convolutional"
    """'convolutional' (factor 4), 'striding' (FastConformer's depthwise; 2, 4, 8) or 'stacking' (2, 4, 8)"""
    subsampling_factor: int = 4
    """mel frames that become one frame of the first stage"""
    subsampling_channels: int = 64
    """channels of the subsampling convolutions"""
    mask: str = "segment"
    """frames that a frame attends to: 'segment' (all of its utterance), 'window', 'causal' or 'chunk'"""
    window: int = 128
    """mask 'window': frames of the first stage seen to either side"""
    chunk_size: int = 16
    """mask 'chunk': frames of the first stage in a chunk"""
    left_chunks: int = 4
    """mask 'chunk': chunks seen before a frame's own; -1 for all"""
    dynamic_chunks: bool = False
    """mask 'chunk': in training, the whole utterance every other time, else a random chunk up to chunk_size"""
    position: str = "rotary"
    """what attention knows of positions: 'rotary', 'relative' (a learned bias a head and distance), 'fourier' (learned
    features of the position, added once before the blocks) or 'none'"""
    rotary_theta: float = 1.5e6
    """wavelength base of the rotary positions. Angles grow by theta^(-2i/d) a frame; at 1.5e6 the slower half of the
    pairs has not completed a turn after some minutes, and the slowest stays within 0.1 rad over an hour (90,000
    encoder frames), so lengths never seen in pretraining remain within angles that were"""
    rotary_interpolation: float = 1.0
    """rotary positions are divided by this, so that longer utterances stay within the angles of shorter ones"""
    relative_buckets: int = 64
    """position 'relative': learned values a head; half for each direction, a quarter of them one distance each"""
    relative_max_distance: int = 800
    """position 'relative': frames from which on all distances share the last bucket"""
    dropout: float = 0.1
    """share of activations dropped, on every residual branch and inside the feed-forward modules"""
    attention_dropout: float = 0.1
    """share of attention weights dropped"""
    layer_drop: float = 0.0
    """probability of a row to pass a block by in training; saves no time, as all processes must run the same blocks"""
    activation_checkpointing: str = "none"
    """what the backward pass computes anew: 'none', 'selective' (what is cheap) or 'full' (all but a block's input)"""
    backend: str = "sdpa"
    """attention on CUDA: 'sdpa', or 'flex' (compiled FlexAttention; no attention_dropout). A CPU always loops over
    segments, where flex has no backward pass"""

    @property
    def stages(self) -> list["EncoderSettings"]:
        """The stages as settings of their own, first to last; only their widths and numbers differ."""
        own = [
            replace(
                self,
                dim=stage.dim,
                num_layers=stage.num_layers,
                num_heads=stage.num_heads,
                feedforward_dim=stage.feedforward_dim,
                group_size=stage.group_size,
                earlier_stages=[],
            )
            for stage in self.earlier_stages
        ]
        return [*own, replace(self, earlier_stages=[])]

    @property
    def stride(self) -> int:
        """Mel frames of an output frame, and of a BEST-RQ target."""
        return self.subsampling_factor << len(self.earlier_stages)

    @property
    def row_multiple(self) -> int:
        """Rows and the starts of segments are multiples of this many mel frames: no group of frames has two owners."""
        groups = [*(stage.group_size for stage in self.earlier_stages), self.group_size]
        multiple = self.stride
        for number, group_size in enumerate(groups):
            multiple = math.lcm(multiple, (self.subsampling_factor << number) * group_size)
        return multiple

    @property
    def row_gap(self) -> int:
        """Mel frames between two segments of a row: what the subsampling's convolutions reach over."""
        return self.subsampling_factor

    @property
    def head_dim(self) -> int:
        """Width of a head of attention, d."""
        return self.dim // self.num_heads * self.group_size

    def __post_init__(self) -> None:
        for name in ("num_mels", "dim", "num_layers", "num_heads", "feedforward_dim", "subsampling_channels",
                     "group_size", "window", "chunk_size"):  # fmt: skip
            _require(getattr(self, name) >= 1, name, getattr(self, name), "give 1 or more")
        _require(
            self.dim % self.num_heads == 0 and (self.position != "rotary" or self.head_dim % 2 == 0),
            "num_heads",
            self.num_heads,
            f"choose one such that dim / num_heads is a whole number, even with rotary positions (dim is {self.dim})",
        )
        _require(
            self.num_kv_heads >= 0 and (self.num_kv_heads == 0 or self.num_heads % self.num_kv_heads == 0),
            "num_kv_heads",
            self.num_kv_heads,
            f"give 0, or a divisor of num_heads = {self.num_heads}",
        )
        _require(self.kernel_size % 2 == 1 and self.kernel_size > 0, "kernel_size", self.kernel_size, "give an odd one")
        self._check_choices()
        factors = {"convolutional": (4,), "striding": (2, 4, 8), "stacking": (2, 4, 8)}[self.subsampling]
        _require(
            self.subsampling_factor in factors,
            "subsampling_factor",
            self.subsampling_factor,
            f"give {' or '.join(map(str, factors))} with subsampling {self.subsampling!r}",
        )
        for name in ("dropout", "attention_dropout", "layer_drop"):
            _require(0.0 <= getattr(self, name) < 1.0, name, getattr(self, name), "give a share from 0 to below 1")
        for name in ("rotary_theta", "rotary_interpolation"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "give a positive number")
        _require(self.left_chunks >= -1, "left_chunks", self.left_chunks, "give 0 or more, or -1 for all")
        _require(
            self.relative_buckets >= 8 and self.relative_buckets % 4 == 0,
            "relative_buckets", self.relative_buckets, "give a multiple of 4 from 8 on",
        )  # fmt: skip
        _require(
            self.relative_max_distance > self.relative_buckets // 4,
            "relative_max_distance",
            self.relative_max_distance,
            f"give more than relative_buckets / 4 = {self.relative_buckets // 4}",
        )
        self._check_combinations()
        try:
            if self.earlier_stages:
                _ = self.stages  # each is checked as it is made
        except UserError as error:
            raise UserError(f"encoder.earlier_stages: {error}") from None

    def _check_choices(self) -> None:
        choices = {
            "feedforward": ("silu", "swiglu"),
            "convolution_norm": ("layer_norm", "rms_norm", "batch_norm"),
            "norm": ("layer_norm", "rms_norm"),
            "subsampling": ("convolutional", "striding", "stacking"),
            "mask": ("segment", "window", "causal", "chunk"),
            "position": ("rotary", "relative", "fourier", "none"),
            "activation_checkpointing": ("none", "selective", "full"),
            "backend": ("sdpa", "flex"),
        }
        for name, values in choices.items():
            _require(getattr(self, name) in values, name, getattr(self, name), f"give {', '.join(map(repr, values))}")

    def _check_combinations(self) -> None:
        _require(
            self.backend != "flex" or self.attention_dropout == 0,
            "attention_dropout",
            self.attention_dropout,
            "FlexAttention has none: give 0 with backend 'flex'",
        )
        _require(
            self.convolution_norm != "batch_norm" or self.activation_checkpointing == "none",
            "activation_checkpointing",
            self.activation_checkpointing,
            "it would count the statistics of convolution_norm 'batch_norm' twice: give 'none', or another norm",
        )
        _require(
            not self.dynamic_chunks or self.mask == "chunk",
            "dynamic_chunks",
            self.dynamic_chunks,
            "give false, or mask 'chunk'",
        )
        group_sizes = [*(stage.group_size for stage in self.earlier_stages), self.group_size]
        _require(
            self.mask != "causal" or max(group_sizes) == 1,
            "group_size",
            max(group_sizes),
            "a group sees its own later frames: give 1 with mask 'causal'",
        )
        in_frames = {"window": self.window, "chunk": self.chunk_size}.get(self.mask, 0)
        for number, group_size in enumerate(group_sizes):
            unit = group_size << number
            _require(
                in_frames % unit == 0,
                "window" if self.mask == "window" else "chunk_size",
                in_frames,
                f"give a multiple of {unit}: frames of stage {number} are that many of the first",
            )
