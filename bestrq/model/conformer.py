"""Conformer encoder for packed rows of segments.

Source: Gulati et al., arXiv 2005.08100; by default with LayerNorm in the convolution module and rotary positions. With
stages of decreasing frame rate it is the Efficient Conformer of Burchi and Vielzeuf, arXiv 2109.01163.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.model.attention.module import SelfAttention
from bestrq.model.convolution import ConvolutionModule
from bestrq.model.cpu.dropout import Dropout
from bestrq.model.layout import RowLayout, StageLayout, make_layout
from bestrq.model.norms import make_norm
from bestrq.model.settings import EncoderSettings
from bestrq.model.subsampling import make_subsampling
from common.segments import Segments

__all__ = ["ConformerBlock", "ConformerEncoder", "EncoderSettings"]


FRAMES_PER_CALL = 8192
"""frames per call of a feed-forward module, if gradients are disabled"""


def apply_framewise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a frame-wise function to `[R, T, D]`, in slices of frames if gradients are disabled.

    Otherwise the hidden units of an hour of audio would take several times the memory of the frames.
    """
    rows, frames, _ = x.shape
    if torch.is_grad_enabled() or rows * frames <= FRAMES_PER_CALL:
        return function(x)
    return torch.cat([function(part) for part in x.flatten(0, 1).split(FRAMES_PER_CALL)]).unflatten(0, (rows, frames))


class FeedForward(nn.Module):
    """Two linear layers with SiLU and dropout in between, `[R, T, D] -> [R, T, D]`.

    With `gated`, a third linear layer gates the hidden units (SwiGLU: Shazeer, arXiv 2002.05202).
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
    """Half-step feed-forward, attention, convolution, half-step feed-forward: pre-norm residual branches, final norm.

    With `dim_out` (last block of a stage), the convolution halves the frame rate and changes the width; its shortcut is
    a linear layer on every second frame.
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
        self.residual = settings.residual
        self.compiled: Callable[..., Tensor] | None = None  # set by `compilation.compile_blocks`

    def forward(self, x: Tensor, layout: StageLayout) -> Tensor:
        """Return `[R, T, D]`, or `[R, T / 2, dim_out]`. Outputs at padding frames are unused."""
        if self.compiled is not None and self.training:
            return self.compiled(self, x, layout)
        return self.compute(x, layout)

    def compute(self, x: Tensor, layout: StageLayout) -> Tensor:
        """`forward` without compilation."""
        y = self.apply_modules(x, lambda x: self.attention(x, layout), lambda x: self.convolution(x, layout))
        if self.training and self.layer_drop > 0:
            # Single rows skip the block: DDP and FSDP need every process to run every block.
            dropped = torch.rand(len(x), 1, 1, device=x.device) < self.layer_drop
            y = torch.where(dropped, x.to(y.dtype), y)
        return y

    def apply_modules(
        self, x: Tensor, attention: Callable[[Tensor], Tensor], convolution: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Apply the block with the given functions in place of attention and convolution, which mix frames."""
        x = apply_framewise(lambda x: self.dropout.add(x, self.feedforward_in(self.feedforward_in_norm(x)), 0.5), x)
        x = self.dropout.add(x, attention(self.attention_norm(x)))
        convolved = convolution(self.convolution_norm(x))
        x = self.dropout.add(x if self.shortcut is None else self.shortcut(x[:, ::2]), convolved)
        out, norm = self.feedforward_out, self.feedforward_out_norm
        x = apply_framewise(lambda x: self.norm(self.dropout.add(x, out(norm(x)), 0.5)), x)
        return cast_residual(x, self.residual)


def cast_residual(x: Tensor, precision: str) -> Tensor:
    """Cast the residual stream to the precision of `EncoderSettings.residual`, if autocast is on."""
    if precision == "auto" or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.float32 if precision == "float32" else torch.get_autocast_dtype(x.device.type))


class ConformerEncoder(nn.Module):
    """Encoder of packed rows of log-mel frames; see `RowLayout`."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self.settings = settings
        stages = settings.stages
        self.subsampling = make_subsampling(stages[0])
        self.fourier: nn.Module | None = None
        if settings.position == "fourier":
            from bestrq.model.learned_positions import FourierPositions

            self.fourier = FourierPositions(stages[0].dim, 1e5)
        self.dropout = Dropout(settings.dropout)
        blocks = []
        for stage, following in zip(stages, [*stages[1:], None], strict=True):
            blocks += [ConformerBlock(stage) for _ in range(stage.num_layers - 1)]
            blocks.append(ConformerBlock(stage, None if following is None else following.dim))
        self.blocks = nn.ModuleList(blocks)
        initialise_subsampling(self.subsampling)
        initialise_blocks(blocks)
        self.stage_of_block = [number for number, stage in enumerate(stages) for _ in range(stage.num_layers)]
        self.layer_sum: nn.Module | None = None
        if settings.output == "weighted_sum":
            from bestrq.model.layer_sum import LayerSum  # imported only for this output

            self.layer_sum = LayerSum(settings.num_layers)

    def layout(self, segments: Segments, backend: str | None = None) -> RowLayout:
        """Layout of a batch, shared by all layers.

        Args:
            segments: in mel frames.
            backend: key of `attention.module.ATTEND`; None to choose by device and settings.
        """
        weight = next(self.parameters())
        return make_layout(
            segments, self.settings, training=self.training, device=weight.device, dtype=weight.dtype, backend=backend
        )

    def forward(
        self, log_mel: Tensor, layout: RowLayout, frozen_blocks: int | None = None, masked: Tensor | None = None
    ) -> Tensor:
        """Encode log-mel `[R, F, M]` to `[R, T, D]`, zero in gaps, in the dtype of the parameters or of autocast.

        T is F / `settings.stride`, rounded up. Rows are padded to a multiple of `settings.row_multiple` internally.

        Args:
            frozen_blocks: run the subsampling and the first N blocks without a graph; None freezes nothing.
            masked: bool `[R, ceil(F / subsampling_factor), D]`, outputs of the subsampling that are set to 0.
        """
        x, _ = self._run(log_mel, layout, len(self.blocks), (), frozen_blocks, masked)
        return self._without_gaps(x, log_mel, layout)

    def block_outputs(self, log_mel: Tensor, layout: RowLayout, numbers: Sequence[int]) -> list[Tensor]:
        """Outputs of the blocks of these numbers, counted from 1, as `[R, T, D]`.

        Blocks after the largest number are not computed. Raises ValueError for a block whose frame rate is not that of
        the output (an earlier stage of an Efficient Conformer).
        """
        if min(numbers) < self.first_full_block or max(numbers) > len(self.blocks):
            raise ValueError(f"outputs of blocks {list(numbers)}: give {self.first_full_block} to {len(self.blocks)}")
        _, outputs = self._run(log_mel, layout, max(numbers), numbers, None, None)
        return [self._without_gaps(outputs[number], log_mel, layout) for number in numbers]

    @property
    def first_full_block(self) -> int:
        """Number, from 1, of the first block whose output has the frame rate of the encoder's output."""
        before = self.stage_of_block.count(self.stage_of_block[-1])
        return max(1, len(self.blocks) - before)

    def _run(
        self, log_mel: Tensor, layout: RowLayout, num_blocks: int, numbers: Sequence[int], frozen_blocks: int | None,
        masked: Tensor | None,
    ) -> tuple[Tensor, dict[int, Tensor]]:  # fmt: skip
        """Run the first blocks; return the last output, or the sum of layers, and the outputs of `numbers`."""
        missing = layout.valid_mel.shape[1] - log_mel.shape[1]
        if not 0 <= missing < self.settings.row_multiple:
            raise ValueError(
                f"rows of {log_mel.shape[1]} mel frames do not fit a layout of {layout.valid_mel.shape[1]}: "
                "compute the layout from these rows"
            )
        mode, trained = self.settings.activation_checkpointing, contextlib.nullcontext()
        with trained if frozen_blocks is None else torch.no_grad():
            x = self.subsampling(F.pad(log_mel, (0, 0, 0, missing)), layout)
            if masked is not None:
                x = x.masked_fill(F.pad(masked, (0, 0, 0, x.shape[1] - masked.shape[1])), 0.0)
            if self.fourier is not None:
                x = x + self.fourier(layout.stages[0].position)
            x = self.dropout(x)
            x = cast_residual(x, self.settings.residual)
        if mode != "none":
            from bestrq.model.activation_checkpointing import run_block  # imported only for this option
        total, outputs = x.new_zeros(()), {}
        for index in range(num_blocks):
            with trained if index >= (frozen_blocks or 0) else torch.no_grad():
                inputs = x, layout.stages[self.stage_of_block[index]]
                block = self.blocks[index]
                x = block(*inputs) if mode == "none" else run_block(block, mode, *inputs)
            if self.layer_sum is not None:
                total = total + self.layer_sum(x, index)
            if index + 1 in numbers:
                outputs[index + 1] = x
        return x if self.layer_sum is None else total, outputs

    def _without_gaps(self, x: Tensor, log_mel: Tensor, layout: RowLayout) -> Tensor:
        num_frames = -(-log_mel.shape[1] // self.settings.stride)
        return x.masked_fill(~layout.output.valid[..., None], 0.0)[:, :num_frames]


# ---- initialisation
#
# With torch's defaults (random biases, unscaled residual branches) the frames of a deep Conformer become nearly equal:
# each block adds a component that is common to all frames, and its last norm shrinks the rest. After 24 blocks, only
# 1 % of the variance was between frames, and training progressed slowly. Therefore:
# - the subsampling preserves the scale of its input (He et al., arXiv 1502.01852): torch's default leaves a tenth of
#   it, which the branches of the first block would dominate;
# - biases start at zero;
# - the output layer of each of the N residual branches starts at torch's weights / sqrt(N) (Radford et al., Language
#   models are unsupervised multitask learners, 2019, section 2.3), so that the sum does not grow with depth.

BRANCHES = ("feedforward_in.out", "attention.out", "convolution.pointwise_out", "feedforward_out.out")
"""output layers of the residual branches of a block"""


def initialise_subsampling(subsampling: nn.Module) -> None:
    """Preserve the mean square of the input; a ReLU follows all layers except the depthwise ones and the last."""
    for name, module in subsampling.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            rectified = not name.startswith("depthwise") and name != "out"
            initialise_layer(module, 2.0 if rectified else 1.0)


def initialise_blocks(blocks: Sequence[nn.Module]) -> None:
    """Set biases to zero and scale the residual branches. Norms keep weight 1 and bias 0."""
    for block in blocks:
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if name in BRANCHES:
                with torch.no_grad():
                    module.get_parameter("weight").mul_((len(BRANCHES) * len(blocks)) ** -0.5)
            if name == "shortcut" and isinstance(module, nn.Linear):
                initialise_layer(module, 1.0)


def initialise_layer(module: nn.Linear | nn.Conv2d, gain: float) -> None:
    """Draw normal weights of variance `gain / fan_in`; set the bias to zero."""
    nn.init.normal_(module.weight, std=(gain / module.weight[0].numel()) ** 0.5)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
