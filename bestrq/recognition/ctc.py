"""CTC on packed rows: an encoder, one linear head, and the loss of every segment by itself.

R rows, F mel frames in a row, M mel bins, T encoder frames in a row, D model width, V vocabulary, S segment slots in
a row, N segments of the whole batch, U label length. Label 0 is the blank.

Graves et al. 2006, "Connectionist Temporal Classification".
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.decoding.tokens import BLANK
from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.model.settings import FREE_ENCODER_FIELDS
from bestrq.training.export import Export, read_trained
from common.config import from_dict, to_dict
from common.errors import UserError
from common.segments import Segments


@dataclass
class CTCOutput:
    """Sums over the segments of a batch: the step divides by the labels of all ranks and micro-batches."""

    loss_sum: Tensor
    """float32 scalar, nats (float64 for a float64 model); segments counted in num_impossible add nothing"""
    num_labels: Tensor
    """int64 scalar: labels of the segments that the loss covers, what the loss is divided by"""
    num_impossible: Tensor
    """int64 scalar: segments with more labels than their frames can carry; a script logs it"""
    best_ids: Tensor
    """int64 [N, T_max]: the most likely id of every frame, detached; for `decoding.greedy_ctc`"""
    num_frames: Tensor
    """int64 [N]: encoder frames of every segment"""


def pad_labels(labels: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Label lists as int64 `[N, U_max]`, padded with 0, and their lengths int64 `[N]`."""
    lengths = torch.tensor([len(one) for one in labels], dtype=torch.int64)
    padded = torch.zeros(len(labels), max((len(one) for one in labels), default=0), dtype=torch.int64)
    for row, one in zip(padded, labels, strict=True):
        row[: len(one)] = torch.tensor(one, dtype=torch.int64)
    return padded, lengths


def segment_frames(segments: Segments, stride: int, num_frames: int) -> tuple[Tensor, Tensor]:
    """Indices of the encoder frames of every used segment, by row, then slot.

    Args:
        segments: in mel frames.
        stride: mel frames per encoder frame.
        num_frames: encoder frames T of a row.

    Returns:
        index: int64 `[N, T_max]`, row * T + t; a frame after the segment's end repeats its last one.
        lengths: int64 `[N]` encoder frames.
    """
    rows, slots = segments.length.nonzero(as_tuple=True)
    starts = rows * num_frames + segments.start[rows, slots] // stride
    lengths = (segments.length[rows, slots] + stride - 1) // stride
    steps = torch.arange(int(lengths.max()) if len(lengths) else 0, device=lengths.device)
    return starts[:, None] + torch.minimum(steps, lengths[:, None] - 1), lengths


def frames_needed(labels: Tensor, label_lengths: Tensor) -> Tensor:
    """Encoder frames that CTC needs for each label sequence, int64 `[N]`: one a label and a blank between equals."""
    positions = torch.arange(1, max(labels.shape[1], 1), device=labels.device)
    repeated = (labels[:, 1:] == labels[:, :-1]) & (positions < label_lengths[:, None])
    return label_lengths + repeated.sum(dim=1)


def frame_log_probs(head: nn.Module, hidden: Tensor) -> Tensor:
    """Log-probabilities `[..., V]` of a linear head, at least float32 under any autocast: bfloat16 log-probabilities
    of a few nats are off by 1 %."""
    logits = head(hidden)
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def ctc_loss(log_probs: Tensor, segments: Segments, stride: int, labels: Tensor, label_lengths: Tensor) -> CTCOutput:
    """The CTC loss of N segments, each over its own frames of the rows `[R, T, V]`; see `CTCModel.forward`.

    stride: mel frames of an encoder frame.
    """
    index, lengths = segment_frames(segments, stride, log_probs.shape[1])
    device = log_probs.device
    lengths, labels, label_lengths = (tensor.to(device) for tensor in (lengths, labels, label_lengths))
    frames = log_probs.flatten(0, 1).index_select(0, index.flatten().to(device)).unflatten(0, index.shape)
    possible = lengths >= frames_needed(labels, label_lengths)
    # Impossible segments have an infinite loss; zero_infinity takes them and their gradients out.
    # Where no segment could be read, ctc_loss would refuse; the sum of nothing keeps the graph, which DDP needs.
    loss_sum = (
        F.ctc_loss(frames.transpose(0, 1), labels, lengths, label_lengths, BLANK, reduction="sum", zero_infinity=True)
        if len(lengths)
        else frames.sum()
    )
    return CTCOutput(
        loss_sum=loss_sum,
        num_labels=(label_lengths * possible).sum(),
        num_impossible=(~possible).sum(),
        best_ids=frames.detach().argmax(dim=-1),
        num_frames=lengths,
    )


class CTCModel(nn.Module):
    """`ConformerEncoder` and a linear head of V outputs."""

    def __init__(self, encoder: EncoderSettings, vocab_size: int) -> None:
        super().__init__()
        self.encoder = ConformerEncoder(encoder)
        self.head = nn.Linear(encoder.dim, vocab_size)

    def log_probs(self, log_mel: Tensor, segments: Segments) -> Tensor:
        """Log-probabilities of every frame of every row, float32 (or float64) `[R, T, V]`.

        A model sharded by FSDP2 needs `torch.distributed.fsdp.register_fsdp_forward_method(model, "log_probs")`.
        """
        return self._log_probs(log_mel, segments, train_encoder=True)

    def _log_probs(self, log_mel: Tensor, segments: Segments, train_encoder: bool) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and train_encoder):
            hidden = self.encoder(log_mel, self.encoder.layout(segments))
        return frame_log_probs(self.head, hidden)

    def forward(
        self,
        log_mel: Tensor,
        segments: Segments,
        labels: Tensor,
        label_lengths: Tensor,
        *,
        train_encoder: bool = True,
    ) -> CTCOutput:
        """The CTC loss of N segments, each over its own frames only.

        Freezing the encoder for the first updates is `train_encoder=False`, a pure function of the step, so nothing
        has to be saved for a resume. The encoder then runs without a graph and its gradients stay None: no optimizer
        moment, no weight decay, no part in the clipped norm. DDP must be told that parameters may be unused
        (`find_unused_parameters=True`) when such steps are planned; FSDP2 needs nothing.

        Args:
            log_mel: normalised features, float32 `[R, F, M]`.
            segments: in mel frames.
            labels: int64 `[N, U]`, the used segments in the order of rows, then slots; values beyond a length are
                ignored. Never 0, the blank.
            label_lengths: int64 `[N]`; 0 is a segment without speech.
        """
        # Not log_probs itself: under FSDP2 that one gathers the weights, which this call has done already.
        log_probs = self._log_probs(log_mel, segments, train_encoder)
        stride = self.encoder.settings.stride
        return ctc_loss(log_probs, segments, stride, labels, label_lengths)


def reinitialise_top_blocks(encoder: ConformerEncoder, num_blocks: int, seed: int) -> None:
    """Give the last `num_blocks` blocks new random weights, by the encoder's own initialisation.

    The top of a BEST-RQ encoder has turned into a predictor of its codes; on small budgets, fine-tuning from fresh
    top blocks can beat fine-tuning from the pretrained ones. A pure function of the settings and `seed`; the global
    random state is left as it was. Before wrapping in DDP or FSDP.

    Raises:
        UserError: `num_blocks` is negative or more than the encoder has.
    """
    if not 0 <= num_blocks <= len(encoder.blocks):
        raise UserError(
            f"reinitialise_top_blocks = {num_blocks}, but the encoder has {len(encoder.blocks)} blocks: "
            f"choose 0 to {len(encoder.blocks)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = ConformerEncoder(encoder.settings)
    for block, fresh_block in zip(encoder.blocks[::-1][:num_blocks], fresh.blocks[::-1][:num_blocks], strict=True):
        block.load_state_dict(fresh_block.state_dict())


def read_pretrained_encoder(folder: str, settings: EncoderSettings) -> Export:
    """The encoder of an export or a checkpoint, its tensors under `encoder.`, checked to be one of these settings;
    `FREE_ENCODER_FIELDS` may differ.

    Raises:
        UserError: there is no export, or naming the field or tensor that differs.
    """
    pretrained = read_trained(folder)
    # Through EncoderSettings, so that an export older than a field has that field's default.
    theirs, ours = to_dict(from_dict(EncoderSettings, pretrained.config.get("encoder", {}))), to_dict(settings)
    differing = [
        f"encoder.{name} is {ours[name]!r}, in the export {theirs[name]!r}"
        for name in ours
        if name not in FREE_ENCODER_FIELDS and ours[name] != theirs[name]
    ]
    if differing:
        raise UserError(f"{folder} holds another encoder: {'; '.join(differing)}")
    tensors = {name: tensor for name, tensor in pretrained.tensors.items() if name.startswith("encoder.")}
    with torch.device("meta"):
        wanted = {f"encoder.{name}": t.shape for name, t in ConformerEncoder(settings).state_dict().items()}
    wrong = sorted(name for name in wanted.keys() | tensors.keys()
                   if name not in wanted or name not in tensors or tensors[name].shape != wanted[name])  # fmt: skip
    if wrong:
        raise UserError(f"{folder}: {len(wrong)} tensors do not fit its own settings, such as {wrong[0]}")
    return replace(pretrained, tensors=tensors)
