"""The quantizer against a float64 brute force, and its invariances."""

import numpy as np
import pytest
import torch

from bestrq.pretraining.quantizer import QuantizerSettings, RandomProjectionQuantizer, stack_frames
from bestrq.pretraining.reporting import unigram_entropy
from common.errors import UserError


def brute_force_codes(quantizer: RandomProjectionQuantizer, stacks: torch.Tensor) -> np.ndarray:
    """Section 3.1 of the paper, literally, in float64: the code at the smallest distance of the two unit vectors."""
    x = stacks.double().numpy()
    labels = []
    for projection, codebook in zip(
        quantizer.projection.double().numpy(), quantizer.codebook.double().numpy(), strict=True
    ):
        z = x @ projection
        z = z / np.linalg.norm(z, axis=-1, keepdims=True)
        c = codebook / np.linalg.norm(codebook, axis=-1, keepdims=True)
        labels.append(np.linalg.norm(z[:, None] - c[None], axis=-1).argmin(axis=-1))
    return np.stack(labels, axis=1)


def test_labels_are_the_nearest_codes_in_float64():
    quantizer = RandomProjectionQuantizer(QuantizerSettings(num_codebooks=3, codebook_size=257), stack_dim=320)
    stacks = torch.randn(200, 320, generator=torch.Generator().manual_seed(1))
    assert np.array_equal(quantizer(stacks).numpy(), brute_force_codes(quantizer, stacks))


def test_labels_do_not_depend_on_autocast_or_on_what_shares_the_batch():
    quantizer = RandomProjectionQuantizer(QuantizerSettings(), stack_dim=320)
    stacks = torch.randn(3000, 320, generator=torch.Generator().manual_seed(2))
    labels = quantizer(stacks)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(stacks), labels)
    one_by_one = torch.cat([quantizer(stacks[i : i + 1]) for i in range(40)])
    assert torch.equal(one_by_one, labels[:40])


def test_white_noise_uses_more_than_95_percent_of_the_codes():
    quantizer = RandomProjectionQuantizer(QuantizerSettings(), stack_dim=320)
    stacks = torch.randn(100_000, 320, generator=torch.Generator().manual_seed(3))
    assert quantizer(stacks).unique().numel() > 0.95 * 8192


def test_same_seed_same_quantizer_and_nothing_to_train():
    first, second = (RandomProjectionQuantizer(QuantizerSettings(seed=7), 320) for _ in range(2))
    other = RandomProjectionQuantizer(QuantizerSettings(seed=8), 320)
    assert torch.equal(first.projection, second.projection) and torch.equal(first.codebook, second.codebook)
    assert not torch.equal(first.codebook, other.codebook)
    assert list(first.parameters()) == []
    assert torch.allclose(first.codebook.norm(dim=-1), torch.ones(1, 8192), atol=1e-6)


def test_stacks_hold_the_frames_of_their_encoder_frame_in_order():
    log_mel = torch.arange(2 * 8 * 3.0).view(2, 8, 3)
    stacks = stack_frames(log_mel, 4)
    assert stacks.shape == (2, 2, 12)
    assert torch.equal(stacks[1, 1], log_mel[1, 4:8].flatten())
    with pytest.raises(UserError, match="row_frames is 6"):
        stack_frames(torch.zeros(1, 6, 3), 4)


def test_unigram_entropy():
    counts = torch.tensor([[1, 1, 1, 1], [4, 0, 0, 0], [0, 0, 0, 0]])
    expected = torch.tensor([np.log(4.0), 0.0, 0.0], dtype=torch.float64)
    assert torch.allclose(unigram_entropy(counts), expected)


# ---- the same labels as other toolkits, for the same projection and codebook: their rules, restated as formulas


def nemo_labels(x: torch.Tensor, weight: torch.Tensor, codes: torch.Tensor, distance: str) -> torch.Tensor:
    """NeMo 2.x, `RandomProjectionVectorQuantizer` (dist_fn 'cosine' or 'l2'), int64 [N, C].

    z_c = W_c x / |W_c x|, with W the weight [C * d, K] of a linear layer. cosine: argmax_v <z_c, e_cv>; l2: argmin_v
    |z_c - e_cv|. The codes e are normalised once.
    """
    projected = (weight @ x.T).T.unflatten(1, (codes.shape[0], codes.shape[2]))
    projected = projected / projected.norm(dim=-1, keepdim=True)
    if distance == "cosine":
        return torch.einsum("ncd,cvd->ncv", projected, codes).argmax(dim=-1)
    return (projected[:, :, None] - codes[None]).norm(dim=-1).argmin(dim=-1)


def wenet_labels(x: torch.Tensor, matrix: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """WeNet, `bestrq_model.py` with global CMVN, int64 [N, C].

    z = x P / (|x P| + 1e-8), normalised over *all* codebooks together; argmin_v |z_c|^2 - 2 <z_c, e_vc> + |e_vc|^2,
    with embeddings [V, C, d].
    """
    projected = x @ matrix
    projected = projected / (projected.norm(dim=-1, keepdim=True) + 1e-8)
    projected = projected.unflatten(1, embeddings.shape[1:])
    products = torch.einsum("ncd,vcd->ncv", projected, embeddings)
    squares = projected.square().sum(dim=-1, keepdim=True) + embeddings.square().sum(dim=-1).T
    return (squares - 2 * products).argmin(dim=-1)


@pytest.mark.parametrize("books", [1, 3])
def test_labels_are_those_of_the_rules_of_nemo_and_wenet(books: int) -> None:
    """WeNet's common norm of all codebooks scales z, which no argmin over unit codes notices."""
    quantizer = RandomProjectionQuantizer(QuantizerSettings(num_codebooks=books, codebook_size=300), 320).double()
    stacks = torch.randn(500, 320, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    labels = quantizer(stacks)
    weight = quantizer.projection.transpose(1, 2).flatten(0, 1)
    assert torch.equal(labels, nemo_labels(stacks, weight, quantizer.codebook, "cosine"))
    assert torch.equal(labels, nemo_labels(stacks, weight, quantizer.codebook, "l2"))
    assert torch.equal(labels, wenet_labels(stacks, weight.T, quantizer.codebook.transpose(0, 1)))
    assert labels.unique().numel() > 200


def test_labels_are_those_of_speechbrain() -> None:
    quantisers = pytest.importorskip("speechbrain.nnet.quantisers", reason="requirements-benchmarks.txt")
    quantizer = RandomProjectionQuantizer(QuantizerSettings(codebook_size=300), 320)
    theirs = quantisers.RandomProjectionQuantizer(320, 16, 300)
    theirs.P.copy_(quantizer.projection[0])
    theirs.CB.copy_(quantizer.codebook[0])
    stacks = torch.randn(4, 100, 320, generator=torch.Generator().manual_seed(5))
    assert torch.equal(quantizer(stacks.flatten(0, 1))[:, 0], theirs(stacks).flatten())
