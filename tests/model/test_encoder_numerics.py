"""Errors of complete encoders against float64, in outputs and gradients, are at most those of plain attention."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tests.reference_attention  # noqa: F401 - adds the backend 'reference'
from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.model.settings import StageSettings
from common.segments import Segments

START, LENGTH, FRAMES = torch.tensor([[0, 96], [4, 0]]), torch.tensor([[85, 160], [203, 0]]), 260
MASKS: dict[str, dict[str, object]] = {
    "segment": {"mask": "segment"},
    "window": {"mask": "window", "window": 12},
    "causal": {"mask": "causal"},
    "chunk": {"mask": "chunk", "chunk_size": 8, "left_chunks": 2},
}
BOUNDED = ("window", "chunk")
POSITIONS = ("rotary", "relative", "fourier", "none")
NORMS = ("layer_norm", "rms_norm")


def make_encoder(**changes: object) -> ConformerEncoder:
    torch.manual_seed(0)
    values = {
        "num_mels": 16, "dim": 64, "num_layers": 2, "num_heads": 4, "feedforward_dim": 96, "kernel_size": 7,
        "subsampling_channels": 8, "relative_buckets": 16, "relative_max_distance": 20, "dropout": 0.0,
        "attention_dropout": 0.0, **changes,
    }  # fmt: skip
    encoder = ConformerEncoder(EncoderSettings(**values)).eval()  # type: ignore[arg-type]
    for name, parameter in encoder.named_parameters():
        if "relative_bias" in name:
            torch.nn.init.normal_(parameter)
    return encoder


def results(encoder: ConformerEncoder, backend: str | None, low: bool = False, repeat: int = 1) -> list[Tensor]:
    """Outputs, and gradients of the input and of every parameter, converted to float64.

    Args:
        low: under bfloat16 autocast.
        repeat: factor for the number of rows.
    """
    dtype = next(encoder.parameters()).dtype
    noise = torch.randn(2 * repeat, FRAMES, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    log_mel = noise.to(dtype).requires_grad_()
    layout = encoder.layout(Segments(START.repeat(repeat, 1), LENGTH.repeat(repeat, 1), FRAMES), backend)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        outputs = encoder(log_mel, layout)
    weight = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    loss = (outputs.double() * weight).sum()
    return [t.detach().double() for t in (outputs, *torch.autograd.grad(loss, [log_mel, *encoder.parameters()]))]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return float(sum((x - y).square().sum() for x, y in zip(a, b, strict=True))) ** 0.5


def assert_within_budget(actual: list[Tensor], plain: list[Tensor], exact: list[Tensor], factor: float = 1.5) -> None:
    """Assert that errors are within `factor` times those of `plain`.

    For outputs, the gradient of the input, and the gradients of all parameters together. Each matrix alone may have
    twice the error of `plain`, and each vector 6 times, as the error of few numbers varies more.
    """
    for part in (slice(0, 1), slice(1, 2), slice(2, None)):
        assert distance(actual[part], exact[part]) <= factor * distance(plain[part], exact[part])
    total = distance(plain[2:], exact[2:])
    for grad, reference, truth in zip(actual[2:], plain[2:], exact[2:], strict=True):
        error, allowed = distance([grad], [truth]), distance([reference], [truth])
        assert error <= (2 if truth.ndim > 1 else 6) * allowed or error < 1e-3 * total


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("num_kv_heads", [0, 2], ids=["", "shared"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("position", POSITIONS)
def test_errors_of_outputs_and_gradients_are_at_most_those_of_plain_attention_at_the_same_precision(
    position: str, mask: str, num_kv_heads: int, norm: str
) -> None:
    """Plain: product, softmax and product over entire rows by torch's math kernel. Exact: the definition in float64.

    All backends agree in float64. In float32 and bfloat16 autocast, the budget is 1.5 times the plain error.
    """
    encoder = make_encoder(position=position, num_kv_heads=num_kv_heads, norm=norm, **MASKS[mask]).double()
    backends = ("segments", "bands") if mask in BOUNDED else ("segments",)
    exact = results(encoder, "reference")
    for backend in (*backends, "dense"):
        torch.testing.assert_close(results(encoder, backend), exact, rtol=1e-9, atol=1e-9)
    encoder.float()
    for low, largest in ((False, 1e-6), (True, 0.01)):
        with sdpa_kernel(SDPBackend.MATH):
            plain = results(encoder, "dense", low)
        assert distance(plain[:1], exact[:1]) < largest * exact[0].norm()
        for backend in backends:
            assert_within_budget(results(encoder, backend, low), plain, exact)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"position": "relative", "num_kv_heads": 2, "feedforward": "swiglu"},
        {"mask": "window", "window": 12, "norm": "rms_norm", "convolution_norm": "rms_norm", "position": "none"},
        {"mask": "chunk", "causal_convolution": True, "position": "fourier", "convolution_norm": "batch_norm"},
        {"subsampling": "striding", "subsampling_factor": 2, "earlier_stages": [StageSettings(1, 32, 4, 64)]},
        {"subsampling": "stacking", "mask": "causal"},
    ],
    ids=["default", "relative", "window", "chunk", "stages", "stacking"],
)
def test_two_threads_equal_one_within_the_error_of_float32(changes: dict[str, object], threads: None) -> None:
    encoder = make_encoder(num_layers=1, **changes)
    runs = {}
    for number in (1, 2):
        torch.set_num_threads(number)
        assert torch.get_num_threads() == number
        runs[number] = results(encoder, None, repeat=4)
    exact = results(encoder.double(), None, repeat=4)
    assert_within_budget(runs[2], runs[1], exact)
    assert distance(runs[2][:1], runs[1][:1]) < 1e-6 * exact[0].norm()
