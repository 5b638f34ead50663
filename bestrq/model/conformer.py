"""The Conformer encoder over packed rows.

Source: Gulati et al., arXiv 2005.08100, with LayerNorm in the convolution module and rotary positions.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.model.attention import SelfAttention
from bestrq.model.convolution import ConvolutionModule
from bestrq.model.dropout import Dropout
from bestrq.model.layout import RowLayout, make_layout
from bestrq.model.norms import make_norm
from bestrq.model.settings import EncoderSettings
from bestrq.model.subsampling import Subsampling

__all__ = ["ConformerBlock", "ConformerEncoder", "EncoderSettings"]


class FeedForward(nn.Module):
    """Two linear maps with SiLU and dropout between, `[R, T, D] -> [R, T, D]`."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, hidden_dim)
        self.dropout = Dropout(dropout)
        self.out = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(F.silu(self.hidden(x))))


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward; each normalised before, added after."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        dim = settings.dim
        self.feedforward_in_norm = make_norm(settings.norm, dim)
        self.feedforward_in = FeedForward(dim, settings.feedforward_dim, settings.dropout)
        self.attention_norm = make_norm(settings.norm, dim)
        self.attention = SelfAttention(dim, settings.num_heads, settings.attention_dropout)
        self.convolution_norm = make_norm(settings.norm, dim)
        self.convolution = ConvolutionModule(dim, settings.kernel_size, settings.norm)
        self.feedforward_out_norm = make_norm(settings.norm, dim)
        self.feedforward_out = FeedForward(dim, settings.feedforward_dim, settings.dropout)
        self.norm = make_norm(settings.norm, dim)
        self.dropout = Dropout(settings.dropout)

    def forward(self, x: Tensor, layout: RowLayout) -> Tensor:
        """`[R, T, D] -> [R, T, D]`; what stands in gaps afterwards means nothing."""
        x = self.dropout.add(x, self.feedforward_in(self.feedforward_in_norm(x)), 0.5)
        x = self.dropout.add(x, self.attention(self.attention_norm(x), layout))
        x = self.dropout.add(x, self.convolution(self.convolution_norm(x), layout))
        x = self.dropout.add(x, self.feedforward_out(self.feedforward_out_norm(x)), 0.5)
        return self.norm(x)


class ConformerEncoder(nn.Module):
    """Log-mel rows to encoder frames. Rows are packed: see `RowLayout`."""

    row_gap = 4
    """mel frames between two segments of a row: the subsampling reaches that far (one encoder frame)"""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self.settings = settings
        self.subsampling = Subsampling(settings.num_mels, settings.subsampling_channels, settings.dim)
        self.dropout = Dropout(settings.dropout)
        self.blocks = nn.ModuleList(ConformerBlock(settings) for _ in range(settings.num_layers))

    def layout(self, segment_start: Tensor, segment_length: Tensor, num_frames: int) -> RowLayout:
        """Where the segments lie, worked out once a batch.

        Args:
            segment_start: int64 `[R, S]` mel frames, multiples of the subsampling factor; keep it on the CPU.
            segment_length: int64 `[R, S]` mel frames; 0 marks an unused slot.
            num_frames: mel frames F of a row, a multiple of the subsampling factor.
        """
        settings, parameter = self.settings, next(self.parameters())
        return make_layout(
            segment_start,
            segment_length,
            num_frames,
            subsampling_factor=settings.subsampling_factor,
            reach=settings.kernel_size // 2,
            rotary_dim=settings.dim // settings.num_heads if settings.position == "rotary" else None,
            rotary_theta=settings.rotary_theta,
            device=parameter.device,
            dtype=parameter.dtype,
        )

    def forward(self, log_mel: Tensor, layout: RowLayout) -> Tensor:
        """Log-mel `[R, F, M]` to `[R, T, D]` in the parameters' dtype (under autocast as it comes); zero in gaps."""
        x = self.dropout(self.subsampling(log_mel, layout))
        for block in self.blocks:
            x = block(x, layout)
        return x.masked_fill(~layout.valid[..., None], 0.0)
