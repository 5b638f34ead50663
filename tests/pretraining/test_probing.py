"""Probes of frozen features: layers, figures without labels, CTC and linear probes, ABX, choice of the best layer."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.model.settings import StageSettings
from bestrq.pretraining.abx import Tokens, abx_errors, draw_triples, warped_distances
from bestrq.pretraining.layer_features import (
    Frames,
    effective_ranks,
    encode_layers,
    frame_correlation,
    frame_labels,
    layer_strides,
    pooled,
    spans,
    stack_log_mel,
)
from bestrq.pretraining.probing import (
    CTCProbe,
    CTCProbeSettings,
    best_layer,
    ctc_losses,
    linear_probe,
    train_ctc_probe,
)
from common.segments import Segments

SMALL = {"dim": 16, "num_layers": 3, "num_heads": 2, "feedforward_dim": 24, "kernel_size": 5, "subsampling_channels": 4}
STAGED = EncoderSettings(**SMALL, earlier_stages=[StageSettings(2, 12, 2, 24)])  # type: ignore[arg-type]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def recordings(lengths: tuple[int, ...] = (97, 240, 33, 160)) -> list[Tensor]:
    return [noise(length, 80, seed=length) for length in lengths]


# ---- layers ----


@pytest.mark.parametrize("settings", [EncoderSettings(**SMALL), STAGED], ids=["plain", "two stages"])  # type: ignore[arg-type]
def test_layers_are_those_of_each_recording_alone(settings: EncoderSettings) -> None:
    """Padding, batching and order leave no trace; the last layer is the output of the encoder."""
    torch.manual_seed(0)
    encoder = ConformerEncoder(settings).eval()
    layers = encode_layers(encoder, recordings())
    assert len(layers) == 1 + len(encoder.blocks)
    assert [layer.stride for layer in layers] == layer_strides(encoder)
    for number, log_mel in enumerate(recordings()):
        rows = torch.nn.functional.pad(log_mel, (0, 0, 0, -len(log_mel) % settings.row_multiple))[None]
        layout = encoder.layout(Segments(torch.tensor([[0]]), torch.tensor([[len(log_mel)]]), rows.shape[1]))
        with torch.no_grad():
            x = encoder.subsampling(rows, layout)
            expected = [x]
            for block, stage in zip(encoder.blocks, encoder.stage_of_block, strict=True):
                x = block(x, layout.stages[stage])
                expected.append(x)
            output = encoder(rows, layout)[0]
        for layer, alone in zip(layers, expected, strict=True):
            frames = layer.recordings()[number]
            assert len(frames) == -(-len(log_mel) // layer.stride)
            torch.testing.assert_close(frames.float(), alone[0, : len(frames)], atol=2e-3, rtol=2e-3)
        last = layers[-1].recordings()[number]
        torch.testing.assert_close(last.float(), output[: len(last)], atol=2e-3, rtol=2e-3)


def test_the_stages_of_an_efficient_conformer_have_their_own_rates() -> None:
    encoder = ConformerEncoder(STAGED)
    assert layer_strides(encoder) == [4, 4, 8, 8, 8, 8], "the last block of the first stage halves the rate"


def test_stacked_log_mel_has_the_frames_of_an_encoder_and_all_values() -> None:
    stacked = stack_log_mel(recordings(), 4)
    assert list(stacked.lengths) == [25, 60, 9, 40] and stacked.values.shape[1] == 320
    for frames, log_mel in zip(stacked.recordings(), recordings(), strict=True):
        assert torch.equal(frames.reshape(-1, 80)[: len(log_mel)], log_mel)
        assert not frames.reshape(-1, 80)[len(log_mel) :].any()


# ---- figures without labels ----


def test_the_frame_correlation_is_that_of_each_feature_within_recordings() -> None:
    frames = Frames.of([noise(n, 5, seed=n).cumsum(0) for n in (30, 50, 1)], 4)
    mean = frames.values.mean(0).tolist()
    correlations = []
    for d in range(5):
        pairs = [
            (float(part[t, d]) - mean[d], float(part[t + 1, d]) - mean[d])
            for part in frames.recordings()
            for t in range(len(part) - 1)
        ]
        x, y = np.array(pairs, dtype=np.float64).T
        correlations.append((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()))
    assert frame_correlation(frames, 10.0) == pytest.approx(np.mean(correlations), rel=1e-5)


def test_slow_features_are_correlated_fast_ones_are_not_and_the_lag_follows_the_rate() -> None:
    fast = noise(4000, 8)
    slow = fast.repeat_interleave(20, dim=0)
    assert abs(frame_correlation(Frames.of([fast], 4), 10.0)) < 0.05
    assert frame_correlation(Frames.of([slow], 4), 10.0) == pytest.approx(0.95, abs=0.01)
    assert frame_correlation(Frames.of([slow], 1), 10.0) == pytest.approx(0.80, abs=0.01), "four frames are 40 ms"
    assert math.isnan(frame_correlation(Frames.of([torch.ones(50, 3)], 4), 10.0))


def test_effective_ranks_are_known_for_known_eigenvalues() -> None:
    values = noise(50_000, 6) @ torch.diag(torch.tensor([2.0, 1, 1, 0, 0, 0])) @ torch.linalg.qr(noise(6, 6, seed=1))[0]
    share = np.array([4, 1, 1]) / 6
    ratio, entropy = effective_ranks(values + 7)
    assert ratio == pytest.approx(1 / (share**2).sum(), rel=0.02)
    assert entropy == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=0.02)
    assert effective_ranks(noise(50_000, 6)) == pytest.approx((6, 6), rel=0.01)
    assert effective_ranks(torch.ones(100, 6)) == (0, 0)
    assert effective_ranks(noise(100, 1) * torch.ones(1, 6)) == pytest.approx((1, 1))
    assert all(map(math.isnan, effective_ranks(torch.full((10, 3), float("nan")))))


def test_passages_and_labels_belong_to_the_frames_whose_centre_is_inside() -> None:
    frames = Frames.of([torch.arange(10.0)[:, None], 100 + torch.arange(20.0)[:, None]], 4)
    # Frame t of stride 4 is centred on t * 40 + 15 ms.
    assert [cut[:, 0].tolist() for cut in spans(frames, 10.0, 1, [(0.05, 0.14), (0.0, 0.001), (9.0, 9.1)])] == [
        [101, 102, 103], [100], [119],
    ]  # fmt: skip
    assert frame_labels(5, 4, 10.0, [(7, 0.05, 0.14), (3, 0.14, 0.2)]).tolist() == [-1, 7, 7, 7, 3]


# ---- CTC probe ----


def settings(**values: float) -> CTCProbeSettings:
    return CTCProbeSettings(**{"steps": 60, "batch": 4, "width": 32, **values})  # type: ignore[arg-type]


def test_one_recording_is_overfitted_to_zero_loss() -> None:
    """Self-test: a probe that cannot memorise one recording cannot judge features."""
    features = [Frames.of([noise(80, 40)], 4)]
    labels = [[5, 1, 3, 3, 2, 4, 1, 5, 2, 1, 3, 4, 4, 2]]
    result = train_ctc_probe(features, labels, features, labels, 6, settings(steps=300))
    assert result.hypotheses == labels
    assert result.nats[0] / len(labels[0]) < 0.02 and result.train_nats_per_label < 0.05


def test_a_probe_is_repeatable_and_leaves_the_random_state_alone() -> None:
    features, labels = [Frames.of([noise(40, 8, seed=s) for s in range(6)], 4)], [[1, 2], [2, 1], [1], [2], [3], [1, 3]]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = train_ctc_probe(features, labels, features, labels, 4, settings())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert train_ctc_probe(features, labels, features, labels, 4, settings()) == first
    assert train_ctc_probe(features, labels, features, labels, 4, settings(seed=1)) != first


def test_a_recording_has_the_same_loss_alone_and_padded() -> None:
    parts = [noise(n, 8, seed=n) for n in (12, 40, 25)]
    layers = [Frames.of(parts, 4), Frames.of([part * 3 + 1 for part in parts], 4)]
    torch.manual_seed(0)
    probe = CTCProbe(layers, 16, 5)
    labels = [[1, 2], [3, 3, 4], [2]]
    together = ctc_losses(probe([layer.recordings() for layer in layers]), [12, 40, 25], labels)
    for number in range(3):
        alone = ctc_losses(
            probe([[layer.recordings()[number]] for layer in layers]), [len(parts[number])], [labels[number]]
        )
        torch.testing.assert_close(together[number], alone[0])


def test_a_weighted_sum_finds_the_layer_with_the_text() -> None:
    rng = np.random.default_rng(0)
    labels = [rng.integers(1, 5, 6).tolist() for _ in range(40)]
    codes = noise(5, 12)
    spoken = [codes[torch.tensor(sequence).repeat_interleave(4)] for sequence in labels]
    text = Frames.of([frames + 0.1 * noise(24, 12, seed=k) for k, frames in enumerate(spoken)], 4)
    other = Frames.of([noise(24, 12, seed=100 + k) for k in range(40)], 4)
    layers = [other, text, other]
    result = train_ctc_probe(layers, labels, layers, labels, 5, settings(steps=200, batch=16))
    assert int(np.argmax(result.layer_weights)) == 1 and sum(result.layer_weights) == pytest.approx(1)


# ---- linear probe and best layer ----


def test_a_linear_probe_separates_classes_at_any_scale_and_noise_gives_chance() -> None:
    labels = torch.arange(400) % 4
    centres = noise(4, 10) * 2
    features = centres[labels] + noise(400, 10, seed=1)
    scaled = features * torch.logspace(-3, 3, 10) + 5
    predicted = linear_probe(features[:300], labels[:300], features[300:], 4)
    assert float((predicted == labels[300:]).double().mean()) > 0.95
    assert torch.equal(linear_probe(scaled[:300], labels[:300], scaled[300:], 4), predicted)
    chance = linear_probe(noise(300, 10, seed=2), labels[:300], noise(100, 10, seed=3), 4) == labels[300:]
    assert float(chance.double().mean()) < 0.45


def test_pooling_is_the_mean_and_the_deviation_of_each_recording() -> None:
    parts = recordings()
    expected = torch.stack([torch.cat([part.mean(0), part.std(0, correction=0)]) for part in parts])
    torch.testing.assert_close(pooled(Frames.of(parts, 1)), expected)


def test_the_best_of_equal_layers_is_not_better_than_they_are() -> None:
    """The minimum over layers is too low by selection; the cross-fitted values are not."""
    rng = np.random.default_rng(0)
    fitted, minimum = [], []
    for _ in range(300):
        values = rng.normal(1.0, 1.0, (12, 40))
        fitted.append(best_layer(values).values.mean())
        minimum.append(values.mean(axis=1).min())
    assert np.mean(minimum) < 0.8
    assert np.mean(fitted) == pytest.approx(1.0, abs=0.03)


def test_the_best_layer_is_the_lowest_and_nan_is_the_worst() -> None:
    values = np.array([[2.0, 2, 2, 2], [1, 1, 1, 1.5], [np.nan, 0, 0, 0]])
    best = best_layer(values)
    assert best.layer == 1 and best.values.tolist() == [1, 1, 1, 1.5]
    assert best_layer(values[:1]).values.tolist() == [2, 2, 2, 2]


# ---- ABX ----


def naive_distance(a: Tensor, b: Tensor) -> float:
    """Cheapest path of all paths, by recursion; its mean angle."""

    def angle(i: int, j: int) -> float:
        x, y = a[i].double(), b[j].double()
        cosine = float((x @ y) / (x.norm() * y.norm()))
        return math.acos(max(-1.0, min(1.0, cosine))) / math.pi

    def cheapest(i: int, j: int) -> tuple[float, int]:
        if i == j == 0:
            return angle(0, 0), 1
        before = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        options = [cheapest(k, m) for k, m in before if k >= 0 and m >= 0]
        cost, steps = min(options, key=lambda option: option[0])
        return cost + angle(i, j), steps + 1

    total, steps = cheapest(len(a) - 1, len(b) - 1)
    return total / steps


def test_warped_distances_are_those_of_the_naive_recursion() -> None:
    features = [noise(n, 4, seed=n) for n in (1, 2, 5, 6, 3)]
    pairs = list(itertools.product(range(5), range(5)))
    expected = [naive_distance(features[i], features[j]) for i, j in pairs]
    assert warped_distances(features, pairs).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("across", [False, True])
def test_triples_have_the_speakers_of_their_task_and_x_has_a_recording_of_its_own(across: bool) -> None:
    rng = np.random.default_rng(0)
    tokens = Tokens(*(rng.integers(0, n, 200).tolist() for n in (6, 3, 12)))
    triples = draw_triples(tokens, 300, across, seed=0)
    assert len(triples) == 300 and np.array_equal(triples, draw_triples(tokens, 300, across, seed=0))
    for a, b, x in triples.tolist():
        assert tokens.category[a] == tokens.category[x] != tokens.category[b]
        assert tokens.speaker[a] == tokens.speaker[b] and (tokens.speaker[a] != tokens.speaker[x]) == across
        assert tokens.recording[x] not in (tokens.recording[a], tokens.recording[b])


def test_impossible_tasks_have_no_triples() -> None:
    assert draw_triples(Tokens([0, 0], [0, 0], [0, 1]), 10, False, 0).shape == (0, 3), "one category"
    assert draw_triples(Tokens([0, 0, 1], [0, 0, 0], [0, 1, 2]), 10, True, 0).shape == (0, 3), "one speaker"
    assert draw_triples(Tokens([0, 0, 1], [0, 0, 0], [0, 0, 0]), 10, False, 0).shape == (0, 3), "one recording"


def test_features_of_the_category_have_no_abx_errors_and_noise_has_half() -> None:
    rng = np.random.default_rng(0)
    tokens = Tokens(rng.integers(0, 5, 300).tolist(), [0] * 300, list(range(300)))
    triples = draw_triples(tokens, 1000, False, 0)
    unrelated = [noise(n, 16, seed=k) for k, n in enumerate(rng.integers(3, 9, 300).tolist())]
    centre = noise(5, 16)
    good = [centre[c] + 0.3 * frames for c, frames in zip(tokens.category, unrelated, strict=True)]
    assert abx_errors(good, triples).mean() < 0.01
    assert abx_errors(unrelated, triples).mean() == pytest.approx(0.5, abs=0.06)
    assert abx_errors([torch.ones(3, 4)] * 300, triples).tolist() == [0.5] * 1000
