"""The Conformer encoder over packed rows.

Source: Gulati et al., arXiv 2005.08100; by default with LayerNorm in the convolution module and rotary positions. In
stages of falling frame rate it is the Efficient Conformer of Burchi and Vielzeuf, arXiv 2109.01163.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.model.attention.module import SelfAttention
from bestrq.model.checkpointing import run_block
from bestrq.model.convolution import ConvolutionModule
from bestrq.model.cpu.dropout import Dropout
from bestrq.model.initialisation import initialise_blocks, initialise_subsampling
from bestrq.model.layout import RowLayout, StageLayout, make_layout
from bestrq.model.norms import make_norm
from bestrq.model.positions import FourierPositions
from bestrq.model.settings import EncoderSettings
from bestrq.model.subsampling import make_subsampling
from common.segments import Segments

__all__ = ["ConformerBlock", "ConformerEncoder", "EncoderSettings"]


SLICE = 8192
"""frames that go through a feed-forward module at once where no gradient is needed"""


def framewise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function`, which treats every frame of `[R, T, D]` by itself, in slices where nothing is kept for a gradient.

    The hidden units of an hour would take several times the memory of the frames themselves, and its time to map.
    """
    rows, frames, _ = x.shape
    if torch.is_grad_enabled() or rows * frames <= SLICE:
        return function(x)
    return torch.cat([function(part) for part in x.flatten(0, 1).split(SLICE)]).unflatten(0, (rows, frames))


class FeedForward(nn.Module):
    """Two linear maps with SiLU and dropout between, `[R, T, D] -> [R, T, D]`.

    With `gated`, a third map of the input is multiplied to the SiLU's output: SwiGLU, Shazeer, arXiv 2002.05202.
    """

    def __init__(self, dim: int, hidden_dim: int, dropout: float, gated: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, hidden_dim)
        self.gate = nn.Linear(dim, hidden_dim) if gated else None
        self.dropout = Dropout(dropout)
        self.out = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.hidden(x))
        if self.gate is not None:
            hidden = hidden * self.gate(x)
        return self.out(self.dropout(hidden))


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward; each normalised before, added after.

    With `dim_out` the convolution halves the frame rate and changes the width, its residual being a linear map of every
    second frame: the last block of a stage.
    """

    def __init__(self, settings: EncoderSettings, dim_out: int | None = None) -> None:
        super().__init__()
        dim, stride = settings.dim, 1 if dim_out is None else 2
        dim_out = dim_out or dim
        gated = settings.feedforward == "swiglu"
        self.feedforward_in_norm = make_norm(settings.norm, dim)
        self.feedforward_in = FeedForward(dim, settings.feedforward_dim, settings.dropout, gated)
        self.attention_norm = make_norm(settings.norm, dim)
        self.attention = SelfAttention(settings)
        self.convolution_norm = make_norm(settings.norm, dim)
        self.convolution = ConvolutionModule(
            dim, settings.kernel_size, settings.convolution_norm, settings.causal_convolution, stride, dim_out
        )
        self.shortcut = None if stride == 1 else nn.Linear(dim, dim_out)
        self.feedforward_out_norm = make_norm(settings.norm, dim_out)
        self.feedforward_out = FeedForward(dim_out, settings.feedforward_dim, settings.dropout, gated)
        self.norm = make_norm(settings.norm, dim_out)
        self.dropout = Dropout(settings.dropout)
        self.layer_drop = settings.layer_drop if stride == 1 else 0.0

    def forward(self, x: Tensor, layout: StageLayout) -> Tensor:
        """`[R, T, D] -> [R, T, D]`, or `[R, T / 2, D']`; what stands in gaps afterwards means nothing."""
        y = self.apply_modules(x, lambda x: self.attention(x, layout), lambda x: self.convolution(x, layout))
        if self.training and self.layer_drop > 0:
            # Every process runs every block, as DDP and FSDP need it: rows are what is dropped.
            dropped = torch.rand(len(x), 1, 1, device=x.device) < self.layer_drop
            y = torch.where(dropped, x.to(y.dtype), y)
        return y

    def apply_modules(
        self, x: Tensor, attention: Callable[[Tensor], Tensor], convolution: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The block around its two modules that look at other frames."""
        x = framewise(lambda x: self.dropout.add(x, self.feedforward_in(self.feedforward_in_norm(x)), 0.5), x)
        x = self.dropout.add(x, attention(self.attention_norm(x)))
        convolved = convolution(self.convolution_norm(x))
        x = self.dropout.add(x if self.shortcut is None else self.shortcut(x[:, ::2]), convolved)
        out, norm = self.feedforward_out, self.feedforward_out_norm
        return framewise(lambda x: self.norm(self.dropout.add(x, out(norm(x)), 0.5)), x)


class ConformerEncoder(nn.Module):
    """Log-mel rows to encoder frames. Rows are packed: see `RowLayout`."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self.settings = settings
        stages = settings.stages
        self.subsampling = make_subsampling(stages[0])
        self.fourier = FourierPositions(stages[0].dim, 1e5) if settings.position == "fourier" else None
        self.dropout = Dropout(settings.dropout)
        blocks = []
        for stage, following in zip(stages, [*stages[1:], None], strict=True):
            blocks += [ConformerBlock(stage) for _ in range(stage.num_layers - 1)]
            blocks.append(ConformerBlock(stage, None if following is None else following.dim))
        self.blocks = nn.ModuleList(blocks)
        initialise_subsampling(self.subsampling)
        initialise_blocks(blocks)
        self.stage_of_block = [number for number, stage in enumerate(stages) for _ in range(stage.num_layers)]

    def layout(self, segments: Segments, backend: str | None = None) -> RowLayout:
        """Layout of a batch, shared by all layers.

        Args:
            segments: in mel frames.
            backend: a key of `attention.module.ATTEND`, in place of the one chosen by device and settings.
        """
        parameter = next(self.parameters())
        return make_layout(
            segments,
            self.settings,
            training=self.training,
            device=parameter.device,
            dtype=parameter.dtype,
            backend=backend,
        )

    def forward(self, log_mel: Tensor, layout: RowLayout) -> Tensor:
        """Log-mel `[R, F, M]` to `[R, T, D]` in the parameters' dtype (under autocast as it comes); zero in gaps.

        T is F / `settings.stride`, rounded up: rows off the grid of `settings.row_multiple` are filled up to it.
        """
        num_frames, missing = -(-log_mel.shape[1] // self.settings.stride), layout.valid_mel.shape[1] - log_mel.shape[1]
        if not 0 <= missing < self.settings.row_multiple:
            raise ValueError(f"rows of {log_mel.shape[1]} mel frames, laid out as {layout.valid_mel.shape[1]}")
        x = self.subsampling(F.pad(log_mel, (0, 0, 0, missing)), layout)
        if self.fourier is not None:
            x = x + self.fourier(layout.stages[0].position)
        x = self.dropout(x)
        for block, stage in zip(self.blocks, self.stage_of_block, strict=True):
            x = run_block(block, self.settings.activation_checkpointing, x, layout.stages[stage])
        return x.masked_fill(~layout.output.valid[..., None], 0.0)[:, :num_frames]
