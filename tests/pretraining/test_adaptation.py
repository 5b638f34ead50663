"""Principal components and refined codes against plain numpy in float64, and their state."""

import numpy as np
import pytest
import torch

from bestrq.pretraining.adaptation import Adaptation, origin, principal_components, refined
from bestrq.pretraining.quantizer import QuantizerSettings, RandomProjectionQuantizer
from bestrq.training.process import World
from common.errors import UserError
from tests.gloo import run_distributed

WIDTH, DIM = 24, 4
PCA = QuantizerSettings(num_codebooks=2, codebook_size=16, codebook_dim=DIM, pca_steps=3)
REFINE = QuantizerSettings(num_codebooks=2, codebook_size=16, codebook_dim=DIM, refine_steps=[4, 8], refine_window=2)


def make(settings: QuantizerSettings) -> tuple[RandomProjectionQuantizer, Adaptation]:
    quantizer = RandomProjectionQuantizer(settings, WIDTH)
    return quantizer, Adaptation(quantizer, settings)


def draw_stacks(count: int, seed: int = 0) -> torch.Tensor:
    """Correlated stacks with a mean, as float32 of the loader."""
    generator = np.random.default_rng(seed)
    basis = np.random.default_rng(99).normal(size=(WIDTH, WIDTH)) * np.geomspace(3, 0.1, WIDTH)[:, None]
    return torch.from_numpy(generator.normal(size=(count, WIDTH)) @ basis + 0.5).float()


def numpy_components(stacks: np.ndarray, whitening: float) -> np.ndarray:
    """Components of the centred stacks by a singular value decomposition, float64 [N, DIM]."""
    centred = stacks - stacks.mean(axis=0)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    std = values[:DIM] / np.sqrt(len(stacks))
    directions = (
        directions[:DIM] * np.sign(directions[np.arange(DIM), np.abs(directions[:DIM]).argmax(axis=1)])[:, None]
    )
    return centred @ directions.T / std**whitening


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_components_are_those_of_a_singular_value_decomposition(whitening: float) -> None:
    stacks = draw_stacks(500).double()
    projection, offset, share = principal_components(
        torch.tensor(500.0, dtype=torch.float64), stacks.sum(dim=0), stacks.T @ stacks, DIM, whitening
    )
    expected = numpy_components(stacks.numpy(), whitening)
    np.testing.assert_allclose((stacks @ projection + offset).numpy(), expected, rtol=1e-8, atol=1e-8)
    assert share == pytest.approx(expected.var(axis=0).sum() / stacks.numpy().var(axis=0).sum()) or whitening
    if whitening == 1:
        np.testing.assert_allclose(expected.std(axis=0), 1, rtol=1e-9)


def test_whitening_a_flat_direction_stays_finite() -> None:
    stacks = torch.zeros(50, WIDTH, dtype=torch.float64)
    stacks[:, 0] = torch.arange(50.0)
    count = torch.tensor(50.0, dtype=torch.float64)
    projection, offset, _ = principal_components(count, stacks.sum(dim=0), stacks.T @ stacks, DIM, 1.0)
    assert bool(torch.isfinite(projection).all() and torch.isfinite(offset).all())


def test_the_projection_is_replaced_once_after_its_steps_by_that_of_all_stacks_so_far() -> None:
    quantizer, adaptation = make(PCA)
    before = quantizer.projection.clone()
    stacks = draw_stacks(300)
    for step, part in enumerate(stacks.split(75), start=1):
        adaptation.observe(step, part, quantizer(part))
        changed = adaptation.update(step, World())
        assert bool(changed) == (step == 3)
        assert torch.equal(quantizer.projection, before) == (step < 3)
    expected = numpy_components(stacks[:225].double().numpy(), 0.0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    for codebook in quantizer.project(stacks[:225]).numpy():
        np.testing.assert_allclose(codebook, expected, atol=2e-5)


def observe_share(world: World, settings: QuantizerSettings, parts: int) -> tuple[torch.Tensor, ...]:
    """Steps of 60 stacks, spread over ranks and micro-batches; buffers and saved statistics at the end."""
    quantizer, adaptation = make(settings)
    for step in range(1, 5):
        share = draw_stacks(60, seed=step)[world.rank :: world.size]
        for part in share.chunk(parts):
            adaptation.observe(step, part, quantizer(part))
        adaptation.update(step, world)
    state = adaptation.tensors(world)
    return quantizer.projection, quantizer.codebook, *(state[name] for name in sorted(state))


@pytest.mark.parametrize("settings", [PCA, REFINE], ids=["pca", "refinement"])
def test_buffers_and_statistics_do_not_depend_on_ranks_and_micro_batches(settings: QuantizerSettings) -> None:
    alone = observe_share(World(), settings, 1)
    ranks = run_distributed(observe_share, 2, settings, 1)
    for spread in (observe_share(World(), settings, 3), *ranks):
        for tensor, expected in zip(spread, alone, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
    for first, second in zip(*ranks, strict=True):
        assert torch.equal(first, second), "all ranks hold the same bits"


def test_codes_become_the_means_of_their_stacks_in_the_window_at_unit_norm_and_unused_ones_stay() -> None:
    quantizer, adaptation = make(REFINE)
    before = quantizer.codebook.clone()
    stacks = draw_stacks(60)
    for step, part in enumerate(stacks.split(15), start=1):
        adaptation.observe(step, part, quantizer(part))
        changed = adaptation.update(step, World())
        assert bool(changed) == (step == 4)
    window = stacks[30:]  # steps 3 and 4
    fresh = RandomProjectionQuantizer(REFINE, WIDTH)
    projected, labels = fresh.project(window).double().numpy(), fresh(window).numpy()
    moved = 0
    for book in range(2):
        means = {}
        for code in range(16):
            own = projected[book][labels[:, book] == code]
            if len(own):
                means[code] = own.mean(axis=0) / np.linalg.norm(own.mean(axis=0))
            else:
                assert torch.equal(quantizer.codebook[book, code], before[book, code]), "an empty code stays"
        moved += len(means)
        new = quantizer.codebook[book, list(means)].double().numpy()
        # Few codes change places, so each mean is found at some id; nearly all are found at their own.
        distance = np.abs(new[:, None] - np.array(list(means.values()))[None]).max(axis=2)
        assert (distance.min(axis=0) < 1e-6).all()
    assert 4 < moved < 32
    torch.testing.assert_close(quantizer.codebook.norm(dim=-1), torch.ones(2, 16), rtol=0, atol=1e-6)
    assert not adaptation.statistics["code_counts"].any(), "the next window starts at zero"


def test_ids_follow_the_codes_and_not_the_clusters() -> None:
    """Means that have changed places are assigned to the ids of the codes that they resemble."""
    codes = torch.eye(4)
    sums = 7.0 * torch.eye(4, dtype=torch.float64)[[1, 0, 2, 3]] + 0.1
    counts = torch.tensor([7.0, 7.0, 7.0, 0.0], dtype=torch.float64)
    new = refined(codes, counts, sums)
    assert new[:3].argmax(dim=1).tolist() == [0, 1, 2]
    assert torch.equal(new[3], codes[3])


def test_a_restored_quantizer_continues_bit_for_bit_and_another_one_is_refused() -> None:
    settings = QuantizerSettings(
        codebook_size=16, codebook_dim=DIM, pca_steps=2, whitening=0.5, refine_steps=[5], refine_window=3
    )
    through, stopped = make(settings), make(settings)
    saved = {}
    for step in range(1, 6):
        stacks = draw_stacks(40, seed=step)
        for quantizer, adaptation in (through, stopped):
            adaptation.observe(step, stacks, quantizer(stacks))
            adaptation.update(step, World())
        if step in (1, 4):  # within the window of each estimate
            quantizer, adaptation = stopped
            saved = adaptation.tensors(World()) | {
                f"quantizer.{k}": v.clone() for k, v in quantizer.state_dict().items()
            }
            saved = {name: tensor.clone() for name, tensor in saved.items()}
            stopped = make(settings)
            stopped[1].restore(saved, "here", World())
    for name, tensor in through[0].state_dict().items():
        assert torch.equal(tensor, stopped[0].state_dict()[name]), name
    assert not torch.equal(through[0].codebook, make(settings)[0].codebook)
    for other in (QuantizerSettings(codebook_size=16, codebook_dim=DIM, pca_steps=2, seed=1),
                  QuantizerSettings(codebook_size=17, codebook_dim=DIM, pca_steps=2)):  # fmt: skip
        with pytest.raises(UserError, match=r"here has another quantizer.*quantizer\.seed"):
            make(other)[1].restore(saved, "here", World())
    assert origin(make(settings)[0]) == origin(make(settings)[0])


def test_settings_that_cannot_work_name_the_field_and_a_fix() -> None:
    with pytest.raises(UserError, match=r"quantizer.whitening is 0.5, but pca_steps is 0"):
        QuantizerSettings(whitening=0.5)
    with pytest.raises(
        UserError, match=r"quantizer.refine_steps has 5: give at least 6.* refine_window = 4 .* after 2"
    ):
        make(QuantizerSettings(codebook_dim=DIM, pca_steps=2, refine_steps=[5], refine_window=4))
    with pytest.raises(UserError, match=r"codebook_dim is 25, but a stack has only 24"):
        make(QuantizerSettings(codebook_dim=25, pca_steps=2))
    with pytest.raises(UserError, match=r"pca_steps is 3, but no stack had a target"):
        make(PCA)[1].update(3, World())
