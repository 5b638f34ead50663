"""What an encoder is made of."""

from dataclasses import dataclass

from bestrq.config import ConfigError


def _require(ok: bool, field: str, value: object, fix: str) -> None:
    if not ok:
        raise ConfigError(f"encoder.{field}: {value!r} is not possible: {fix}")


@dataclass(frozen=True)
class EncoderSettings:
    """Shape of a Conformer encoder. `bestrq.model.presets` holds named ones."""

    num_mels: int = 80
    """mel bins of the input"""
    dim: int = 144
    """model width D"""
    num_layers: int = 6
    """Conformer blocks"""
    num_heads: int = 4
    """attention heads; they divide dim into heads of an even width"""
    feedforward_dim: int = 576
    """hidden width of the two feed-forward modules of a block"""
    kernel_size: int = 15
    """encoder frames that the depthwise convolution sees; odd"""
    subsampling_factor: int = 4
    """mel frames an encoder frame; only 4 is built"""
    subsampling_channels: int = 64
    """channels of the two subsampling convolutions"""
    dropout: float = 0.1
    """share of activations dropped, on every residual branch and inside the feed-forward modules"""
    attention_dropout: float = 0.1
    """share of attention weights dropped"""
    position: str = "rotary"
    """what attention knows of positions: 'rotary' or 'none'"""
    rotary_theta: float = 1.5e6
    """wavelength base of the rotary positions. Angles grow by theta^(-2i/d) a frame; at 1.5e6 the slower half of the
    pairs has not completed a turn after some minutes, and the slowest stays within 0.1 rad over an hour (90,000
    encoder frames), so lengths never seen in pretraining remain within angles that were"""
    norm: str = "layer_norm"
    """normalisation: 'layer_norm'"""
    backend: str = "sdpa"
    """attention implementation: 'sdpa'"""

    def __post_init__(self) -> None:
        for field in ("num_mels", "dim", "num_layers", "num_heads", "feedforward_dim", "subsampling_channels"):
            _require(getattr(self, field) >= 1, field, getattr(self, field), "give 1 or more")
        _require(
            self.dim % (2 * self.num_heads) == 0,
            "num_heads",
            self.num_heads,
            f"choose one such that dim / num_heads is an even whole number (dim is {self.dim})",
        )
        _require(self.kernel_size % 2 == 1 and self.kernel_size > 0, "kernel_size", self.kernel_size, "give an odd one")
        _require(self.subsampling_factor == 4, "subsampling_factor", self.subsampling_factor, "only 4 is built, give 4")
        for field in ("dropout", "attention_dropout"):
            _require(0.0 <= getattr(self, field) < 1.0, field, getattr(self, field), "give a share from 0 to below 1")
        _require(self.position in ("rotary", "none"), "position", self.position, "give 'rotary' or 'none'")
        _require(self.rotary_theta > 0, "rotary_theta", self.rotary_theta, "give a positive number")
        _require(self.norm == "layer_norm", "norm", self.norm, "give 'layer_norm'")
        _require(self.backend == "sdpa", "backend", self.backend, "give 'sdpa'")
