"""Tests that need a GPU: `pytest -m cuda` runs them on a machine with one.

If possible, some of their cases also run on the CPU, which shows that the test itself works; FlexAttention then runs
uncompiled, without its check against gradients on a CPU, and varlen attention by tests/varlen_on_a_cpu.py.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as torch_flex

import finetune_ctc
import finetune_rnnt
import pretrain
import tests.reference_attention  # noqa: F401 - adds the backend 'reference'
from bestrq.model import norms
from bestrq.model.attention import flex
from bestrq.model.attention.module import ATTEND
from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.model.layout import StageLayout, make_layout
from bestrq.model.presets import PRESETS
from bestrq.training.precision import has_bfloat16
from common.config import parse
from common.segments import Segments
from tests.model.test_encoder_attention import BOUNDED, HEADS, LENGTHS, MASKS, LargestTensor, attend_eagerly
from tests.tiny import DATA, ENCODER, RUN, make_dataset
from tests.varlen_on_a_cpu import varlen_on_a_cpu

ON_CUDA = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here"),
]


def on(device: str, *values: Any) -> Any:
    """A case for `pytest.mark.parametrize` whose first value is the device."""
    return pytest.param(device, *values, marks=ON_CUDA if device == "cuda" else [])


@pytest.fixture(autouse=True)
def attention_runs_on_a_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if getattr(request.node, "callspec", None) is None or request.node.callspec.params.get("device") != "cpu":
        yield
        return
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "compiled_flex_attention", partial(flex.compiled_flex_attention, backend="aot_eager"))
    with varlen_on_a_cpu():
        yield


def layout_on(
    device: str, backend: str, dtype: torch.dtype, lengths: list[int] = LENGTHS, rows: int = 2, **settings: Any
) -> StageLayout:
    """Rows of segments one frame apart; by default of no multiple of 128."""
    length = torch.tensor([lengths] * rows)
    start = length.cumsum(dim=1) - length + torch.arange(len(lengths))
    frames = int(start[0, -1] + length[0, -1]) + 1
    layout = make_layout(
        Segments(4 * start, 4 * length, 4 * frames), EncoderSettings(num_heads=HEADS, **settings),
        training=False, device=torch.device(device), dtype=dtype, backend=backend,
    )  # fmt: skip
    return layout.output


def attend(layout: StageLayout, qkv: Tensor, bias: Tensor | None, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Outputs of valid frames and gradients, on the CPU in float64; the bias stays float32 at least, as in training."""
    device = layout.valid.device
    qkv = qkv.to(device, dtype).requires_grad_()
    wanted = [qkv]
    if bias is not None:
        bias = bias.to(device, torch.promote_types(dtype, torch.float32)).requires_grad_()
        wanted.append(bias)
    out = ATTEND[backend](qkv, HEADS, layout.attention, bias, 0.0)
    assert torch.isfinite(out).all()
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).bfloat16()
    loss = (out * weight.to(out) * layout.valid[..., None, None]).sum()
    return [x.detach().double().cpu() for x in (out[layout.valid], *torch.autograd.grad(loss, wanted))]


def inputs(num_kv_heads: int, position: str, head_dim: int, frames: int) -> tuple[Tensor, Tensor | None]:
    """Values that bfloat16 represents exactly, so that precisions differ in the arithmetic only."""
    torch.manual_seed(0)
    qkv = torch.randn(2, frames, HEADS + 2 * num_kv_heads, head_dim).bfloat16().double()
    return qkv, torch.randn(HEADS, 2 * 11 + 1).bfloat16().double() if position == "relative" else None


def attention_cases() -> Iterator[Any]:
    for backend, mask, position in product(("dense", "bands", "flex"), MASKS, ("rotary", "relative", "none")):
        if backend == "bands" and mask not in BOUNDED:
            continue
        yield on("cuda", backend, mask, position)
        if mask == "window":
            yield on("cpu", backend, mask, position)


@pytest.mark.parametrize(("device", "backend", "mask", "position"), list(attention_cases()))
def test_every_way_of_attention_is_the_definition(device: str, backend: str, mask: str, position: str) -> None:
    """Forward and backward; float64 to the last digits, flex in float32, where its kernels take no float64."""
    dtype, tolerance = (torch.float32, 1e-4) if backend == "flex" else (torch.float64, 1e-10)
    settings = {"dim": HEADS * 36, "position": position, **MASKS[mask]}
    exact_layout, layout = (
        layout_on("cpu", "reference", torch.float64, **settings), layout_on(device, backend, dtype, **settings)
    )  # fmt: skip
    for num_kv_heads in (4, 2, 1):
        qkv, bias = inputs(num_kv_heads, position, 36, layout.valid.shape[1])
        exact = attend(exact_layout, qkv, bias, "reference", torch.float64)
        for ours, truth in zip(attend(layout, qkv, bias, backend, dtype), exact, strict=True):
            assert (ours - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize(
    ("device", "head_dim", "position"),
    [*(on("cuda", d, p) for d in (6, 16, 48, 64, 72, 90, 128) for p in ("rotary", "relative")),
     *(on("cpu", 90, p) for p in ("rotary", "relative"))],
)  # fmt: skip
def test_flex_in_bfloat16_is_as_exact_as_plain_products_and_softmax(
    device: str, head_dim: int, position: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Budget: 1.5 times the error that the plain definition has in bfloat16, against float64; any width of head."""
    monkeypatch.setitem(ATTEND, "dense", attend_eagerly)
    settings = {"dim": HEADS * head_dim, "position": position, "mask": "window", "window": 40}
    exact_layout = layout_on("cpu", "reference", torch.float64, **settings)
    qkv, bias = inputs(2, position, head_dim, exact_layout.valid.shape[1])
    exact = attend(exact_layout, qkv, bias, "reference", torch.float64)
    ours = attend(layout_on(device, "flex", torch.float32, **settings), qkv, bias, "flex", torch.bfloat16)
    # The definition has no shared heads.
    rough_layout = layout_on("cpu", "dense", torch.float32, **settings)
    qkv = torch.cat((qkv[:, :, :HEADS], qkv[:, :, HEADS:].repeat_interleave(2, dim=2)), dim=2)
    rough = attend(rough_layout, qkv, bias, "dense", torch.bfloat16)
    shared = rough[1][:, :, HEADS:].unflatten(2, (-1, 2)).sum(dim=3)
    rough[1] = torch.cat((rough[1][:, :, :HEADS], shared), dim=2)
    for truth, mine, reference in zip(exact, ours, rough, strict=True):
        error = (mine - truth).norm()
        assert error <= 1.5 * (reference - truth).norm() and error <= 0.03 * truth.norm()


@pytest.mark.parametrize(
    ("device", "mask", "head_dim", "num_kv_heads"),
    [*(on("cuda", *case) for case in product(("segment", "window", "causal"), (40, 64, 128), (4, 1))),
     on("cpu", "window", 40, 1)],
)  # fmt: skip
def test_varlen_in_bfloat16_is_the_definition(device: str, mask: str, head_dim: int, num_kv_heads: int) -> None:
    """Forward and backward, against float64, with rotary positions."""
    settings = {"dim": HEADS * head_dim, **MASKS[mask]}
    exact_layout = layout_on("cpu", "reference", torch.float64, **settings)
    qkv, _ = inputs(num_kv_heads, "rotary", head_dim, exact_layout.valid.shape[1])
    exact = attend(exact_layout, qkv, None, "reference", torch.float64)
    layout = layout_on(device, "varlen", torch.float32, **settings)
    for ours, truth in zip(attend(layout, qkv, None, "varlen", torch.bfloat16), exact, strict=True):
        assert (ours - truth).norm() <= 0.03 * truth.norm()


@pytest.mark.parametrize(
    ("device", "backend", "frames"),
    [*(on("cuda", backend, 45_000) for backend in ("bands", "flex", "varlen")), on("cpu", "bands", 3_000)],
)  # 45,000 frames are half an hour
def test_memory_of_a_window_is_linear_in_the_length_of_the_row(device: str, backend: str, frames: int) -> None:
    peaks = []
    for length in (frames, 2 * frames):
        layout = layout_on(device, backend, torch.float32, [length], 1, dim=HEADS * 64, mask="window", window=128)
        qkv = torch.randn(1, length + 1, 3 * HEADS, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        if device == "cpu":
            with LargestTensor() as largest:
                ATTEND[backend](qkv, HEADS, layout.attention, None, 0.0).float().sum().backward()
            peaks.append(largest.numel)
        else:
            torch.cuda.reset_peak_memory_stats()
            ATTEND[backend](qkv, HEADS, layout.attention, None, 0.0).float().sum().backward()
            peaks.append(torch.cuda.max_memory_allocated())
            del layout, qkv
    assert peaks[1] <= 2.2 * peaks[0]


@pytest.mark.parametrize("device", [on("cuda"), on("cpu")])
def test_fifty_batches_train_without_compiling_again(device: str) -> None:
    torch.manual_seed(0)
    settings = EncoderSettings(
        num_mels=8, dim=32, num_layers=2, num_heads=2, feedforward_dim=32, subsampling_channels=4, position="relative",
        mask="window", window=20, attention_dropout=0.0, backend="flex",
    )  # fmt: skip
    encoder = ConformerEncoder(settings).to(device)
    compiled = []
    for batch in range(50):
        length = 40 + 4 * batch
        starts, lengths = torch.tensor([[0, length + 4]] * 2), torch.tensor([[length, 700 - length]] * 2)
        layout = encoder.layout(Segments(starts, lengths, 800), "flex")
        encoder(torch.randn(2, 800, 8, device=device), layout).sum().backward()
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[-1] == compiled[0] > 0


def make_encoder(settings: EncoderSettings) -> ConformerEncoder:
    """Encoder whose biases of relative positions are not at their initial value of 0."""
    torch.manual_seed(0)
    encoder = ConformerEncoder(settings)
    for name, parameter in encoder.named_parameters():
        if "relative_bias" in name:
            nn.init.normal_(parameter)
    return encoder


def losses_of(encoder: ConformerEncoder, device: str, backend: str | None, bfloat16: bool) -> tuple[Tensor, Tensor]:
    """A scalar of the outputs of packed rows, and the norms of the gradients of all parameters."""
    encoder.to(device).zero_grad()
    dtype = next(encoder.parameters()).dtype
    starts, lengths = torch.tensor([[0, 384], [0, 0]]), torch.tensor([[333, 401], [790, 0]])
    log_mel = torch.randn(2, 816, encoder.settings.num_mels, generator=torch.Generator().manual_seed(1))
    with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
        output = encoder(log_mel.to(device, dtype), encoder.layout(Segments(starts, lengths, 816), backend))
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    loss = (output * weight.to(output)).square().mean()
    loss.backward()
    norms = [torch.zeros(()) if p.grad is None else p.grad.norm().cpu() for p in encoder.parameters()]
    return loss.detach().double().cpu(), torch.stack(norms).double()


@pytest.mark.parametrize(
    ("device", "preset", "mode"),
    [*(on("cuda", name, "none") for name in PRESETS), *(on("cuda", "base-120m", m) for m in ("selective", "full")),
     on("cpu", "quickstart", "full"), on("cpu", "efficient-13m", "none")],
)  # fmt: skip
def test_presets_train_in_bfloat16_by_every_backend_as_in_float32_on_the_cpu(
    device: str, preset: str, mode: str
) -> None:
    """One block per stage, at full width."""
    settings = PRESETS[preset]
    stages = [replace(stage, num_layers=1) for stage in settings.earlier_stages]
    settings = replace(
        settings, num_layers=1, earlier_stages=stages, dropout=0.0, attention_dropout=0.0, activation_checkpointing=mode
    )
    encoder = make_encoder(settings)
    loss, grads = losses_of(encoder, "cpu", "segments", False)
    varlen = settings.position == "rotary" and settings.head_dim % 8 == 0
    for backend in ("dense", "flex", *(["varlen"] if varlen else [])):
        ours, our_grads = losses_of(encoder, device, backend, True)
        assert float(ours) == pytest.approx(float(loss), rel=3e-2)
        assert bool(((our_grads - grads).abs() <= 0.2 * grads + 1e-5 * grads.max()).all())


@pytest.mark.parametrize(
    ("device", "changes"),
    [on(device, changes) for device in ("cuda", "cpu") for changes in (
        {}, {"convolution_norm": "batch_norm"}, {"norm": "rms_norm", "convolution_norm": "rms_norm"},
        {"mask": "window", "window": 10, "position": "relative", "num_kv_heads": 1},
        {"mask": "chunk", "causal_convolution": True, "subsampling": "striding"})],
)  # fmt: skip
def test_encoder_gives_the_outputs_gradients_and_statistics_of_the_cpu_in_float64(
    device: str, changes: dict[str, Any]
) -> None:
    settings = EncoderSettings(
        dim=32, num_layers=2, num_heads=2, feedforward_dim=64, dropout=0.0, attention_dropout=0.0, **changes
    )
    results = []
    for place, backend in (("cpu", "reference"), (device, None)):
        encoder = make_encoder(settings).double()
        loss, grads = losses_of(encoder, place, backend, False)
        results.append([loss, grads, *(b.cpu() for b in encoder.buffers())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("device", "kind"), [on("cuda", "layer_norm"), on("cuda", "rms_norm")])
def test_norms_of_apex_are_those_of_torch(device: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("apex.normalization.fused_layer_norm", reason="NVIDIA's Apex is not installed here")
    x = torch.randn(7, 48, device=device, requires_grad=True)
    norm = norms.make_norm(kind, 48).to(device)
    apex = [norm(x), *torch.autograd.grad(norm(x).sin().sum(), [x, *norm.parameters()])]
    monkeypatch.setattr(norms, "fused_layer_norm_affine", None)
    monkeypatch.setattr(norms, "fused_rms_norm_affine", None)
    plain = [norm(x), *torch.autograd.grad(norm(x).sin().sum(), [x, *norm.parameters()])]
    torch.testing.assert_close(apex, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "script", "head"),
    [
        on("cuda", pretrain, []),
        on("cuda", finetune_ctc, []),
        on("cuda", finetune_rnnt, ["--transducer.prune_range=6", "--transducer.ctc_weight=0.3"]),
        on("cuda", finetune_rnnt, ["--transducer.prediction=lstm"]),
        on("cuda", finetune_rnnt, ["--transducer.durations=[0,1,2]"]),
    ],
    ids=["pretrain", "ctc", "rnnt", "rnnt lstm", "tdt"],
)
def test_scripts_follow_the_cpu_in_float32_and_run_in_bfloat16(
    device: str, script: Any, head: list[str], tmp_path: Path
) -> None:
    dataset = make_dataset(tmp_path / "data", recordings=30)
    losses = {}
    for place, precision in (("cpu", "float32"), (device, "float32"), (device, "bfloat16")):
        folder = tmp_path / f"{place}-{precision}"
        choices = [f"--distributed.device={place}", f"--distributed.precision={precision}", "--masking.noise_std=0"]
        options = [*ENCODER, *DATA, *RUN, "--run.steps=4", f"--data.dataset={dataset}", f"--run.folder={folder}"]
        options += ["--encoder.dropout=0", "--encoder.attention_dropout=0", *choices]
        if script is finetune_rnnt:
            options += ["--transducer.dropout=0", *head]
        if script is not pretrain:
            options.remove("--masking.noise_std=0")  # noise is drawn on the device: another generator there
        script.train(parse(script.Config, options))
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses[place, precision] = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[device, "float32"] == pytest.approx(losses["cpu", "float32"], rel=1e-3)
    assert losses[device, "bfloat16"] == pytest.approx(losses["cpu", "float32"], rel=3e-2)


@pytest.mark.parametrize("device", [on("cuda")])
def test_auto_precision_is_bfloat16_where_the_gpu_multiplies_it(device: str) -> None:
    assert has_bfloat16(torch.device(device)) == (torch.cuda.get_device_capability()[0] >= 8)
