"""Compiled blocks: outputs and gradients of eager blocks, one compilation for batches of any layout.

Dynamo's backend 'aot_eager' traces forward and backward graphs and runs them by torch's operators, in seconds; only one
test generates code.
"""

import copy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as torch_flex
from torch.utils.flop_counter import FlopCounterMode

from bestrq.model.activation_checkpointing import MODES
from bestrq.model.compilation import compile_blocks
from bestrq.model.conformer import ConformerEncoder
from bestrq.model.settings import CheckpointingMode, EncoderSettings, StageSettings
from bestrq.training.process import DistributedSettings, World, autocast, parallelise
from common.segments import Segments
from tests.gloo import run_distributed
from tests.varlen_on_a_cpu import varlen_on_a_cpu

TINY = EncoderSettings(
    num_mels=16, dim=32, num_layers=3, num_heads=2, feedforward_dim=48, kernel_size=7, subsampling_channels=4,
    dropout=0.0, attention_dropout=0.0, compile=True,
)  # fmt: skip
VARIANTS: dict[str, tuple[CheckpointingMode, dict[str, Any]]] = {
    "plain": ("none", {}),
    "relative positions, grouped queries, full": (
        "full", {"position": "relative", "num_kv_heads": 1, "feedforward": "swiglu", "norm": "rms_norm"},
    ),
    "window, causal convolution, selective": (
        "selective", {"mask": "window", "window": 8, "causal_convolution": True},
    ),
    "two stages": (
        "none",
        {"earlier_stages": [StageSettings(num_layers=2, dim=24, num_heads=2, feedforward_dim=32, group_size=2)]},
    ),
}  # fmt: skip
FRAMES = 192


@pytest.fixture(autouse=True)
def new_dynamo() -> Iterator[None]:
    """Dynamo without compiled functions; its counters and the settings of `compile_blocks` are restored."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(optimize_ddp=torch._dynamo.config.optimize_ddp):
        yield
    torch._dynamo.reset()


def draw_segments(seed: int, rows: int = 2, slots: int = 4) -> Segments:
    """Rows of one to `slots` segments of random lengths, with random gaps."""
    generator = torch.Generator().manual_seed(seed)
    start, length = torch.zeros(2, rows, slots, dtype=torch.int64)
    for row in range(rows):
        count = int(torch.randint(1, slots + 1, (), generator=generator))
        place = FRAMES // count // 16 * 16
        for slot in range(count):
            start[row, slot] = slot * place
            length[row, slot] = int(torch.randint(9, place - 8, (), generator=generator))
    return Segments(start, length, FRAMES)


def encoders(settings: EncoderSettings, backend: Any = "aot_eager") -> tuple[ConformerEncoder, ConformerEncoder]:
    """The same encoder twice, uncompiled and compiled, with positions that have a bias."""
    torch.manual_seed(0)
    eager = ConformerEncoder(settings).train()
    with torch.no_grad():
        for name, parameter in eager.named_parameters():
            if "relative_bias" in name:
                parameter.normal_()
    compiled = copy.deepcopy(eager)
    compile_blocks(compiled.blocks, settings.activation_checkpointing, backend)
    return eager, compiled


def encode(encoder: ConformerEncoder, seed: int = 0, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    log_mel = torch.randn(2, FRAMES, encoder.settings.num_mels, generator=generator)
    segments = draw_segments(seed)
    torch.manual_seed(seed)
    return encoder(log_mel.to(next(encoder.parameters()).dtype), encoder.layout(segments), **options)


def graphs() -> int:
    """Graphs compiled since the start of the test."""
    return int(counters["stats"]["unique_graphs"])


def compare(eager: ConformerEncoder, compiled: ConformerEncoder, tolerance: float, seed: int = 0) -> None:
    outputs = [encode(encoder, seed) for encoder in (eager, compiled)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=tolerance, atol=tolerance)
    for encoder, output in zip((eager, compiled), outputs, strict=True):
        encoder.zero_grad()
        output[..., ::3].square().sum().backward()
    for (name, actual), expected in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        assert actual.grad is not None and expected.grad is not None, name
        scale = float(expected.grad.abs().max())
        torch.testing.assert_close(actual.grad, expected.grad, rtol=tolerance, atol=tolerance * (scale + 1e-3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_blocks_equal_eager_blocks(variant: str) -> None:
    mode, changes = VARIANTS[variant]
    eager, compiled = encoders(replace(TINY, activation_checkpointing=mode, **changes))
    assert eager.layout(draw_segments(0)).output.attention.backend in ("dense", "bands")
    for seed in range(2):
        compare(eager, compiled, 2e-5, seed)
    stages = len(eager.settings.stages)
    # One graph per stage; the block that halves the frame rate is another one.
    assert graphs() == 2 * stages - 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor's code for a CPU needs g++")
def test_generated_code_equals_eager_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    compare(*encoders(replace(TINY, num_layers=1, activation_checkpointing="full"), "inductor"), 1e-4)


@pytest.mark.parametrize("mask", ["segment", "window"])
@pytest.mark.parametrize("mode", MODES)
def test_no_compilation_after_the_first_batch(mode: CheckpointingMode, mask: Any) -> None:
    """Batches differ in number, places and lengths of the segments."""
    settings = replace(TINY, activation_checkpointing=mode, dropout=0.1, layer_drop=0.2, mask=mask, window=8)
    _, compiled = encoders(settings)
    encode(compiled).sum().backward()
    assert graphs() == 1  # shared by the blocks
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(1, 51):
            encode(compiled, seed).sum().backward()
    assert graphs() == 1


@pytest.mark.filterwarnings("error:Dynamo detected a call to a `functools.lru_cache`")
def test_flex_is_part_of_the_graph_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)  # no gradients on a CPU otherwise
    monkeypatch.setattr("bestrq.model.layout.choose_backend", lambda *args: "flex")
    eager, compiled = encoders(replace(TINY, position="relative", mask="window", window=8, num_layers=2))
    encode(compiled).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(1, 10):
            encode(compiled, seed).sum().backward()
    assert graphs() == 1
    monkeypatch.setattr("bestrq.model.layout.choose_backend", lambda *args: "dense")
    flex = [parameter.grad for parameter in compiled.parameters()]
    for seed in range(10):
        encode(eager, seed).sum().backward()
    for parameter, grad in zip(eager.parameters(), flex, strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-4)


def test_varlen_is_part_of_the_graph_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = "varlen"
    monkeypatch.setattr("bestrq.model.layout.choose_backend", lambda *args: backend)
    eager, compiled = encoders(replace(TINY, mask="window", window=8, num_layers=2))
    with varlen_on_a_cpu():
        encode(compiled).sum().backward()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in range(1, 10):
                encode(compiled, seed).sum().backward()
    assert graphs() == 1
    backend = "dense"
    for seed in range(10):
        encode(eager, seed).sum().backward()
    for parameter, exact in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, exact.grad, rtol=1e-4, atol=1e-4)


def test_frozen_blocks_and_their_release_compile_once_each() -> None:
    _, compiled = encoders(TINY)
    for frozen in (2, None):
        encode(compiled, frozen_blocks=frozen).sum().backward()
    first = graphs()
    assert first <= 3  # without gradients; with gradients of the weights only; with gradients of the input as well
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(8):
            encode(compiled, seed, frozen_blocks=(2, None)[seed % 2]).sum().backward()
    assert graphs() == first


@pytest.mark.parametrize("mode", MODES)
def test_recomputation_draws_the_same_dropout(mode: CheckpointingMode) -> None:
    """The gradient equals the difference quotient of the loss for a fixed seed."""
    _, compiled = encoders(replace(TINY, dropout=0.2, attention_dropout=0.2, layer_drop=0.3))
    compile_blocks(compiled.blocks, mode, "aot_eager")
    compiled.double()
    weight = compiled.blocks[0].feedforward_in.hidden.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses = []
    for distance in (0.0, 1e-5, -1e-5):
        with torch.no_grad():
            weight += distance * direction
        loss = encode(compiled)[..., ::3].square().sum()
        if distance == 0:
            loss.backward()
        with torch.no_grad():
            weight -= distance * direction
        losses.append(loss.item())
    assert weight.grad is not None
    torch.testing.assert_close(
        (losses[1] - losses[2]) / 2e-5, float((weight.grad * direction).sum()), rtol=1e-5, atol=0
    )


def test_modes_store_less() -> None:
    """The policy of 'selective' applies inside compiled blocks."""
    stored = {}
    for mode in MODES:
        _, compiled = encoders(replace(TINY, activation_checkpointing=mode))
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            encode(compiled).sum().backward()
        stored[mode] = sum(saved.values())
    assert stored["full"] < 0.8 * stored["selective"] < 0.8**2 * stored["none"]


def test_evaluation_and_dispatch_modes_run_uncompiled() -> None:
    eager, compiled = encoders(TINY)
    for encoder in (eager, compiled):
        encoder.eval()
    assert compiled.layout(draw_segments(0)).output.attention.backend == "segments"
    assert torch.equal(encode(compiled), encode(eager))
    compiled.train()
    with FlopCounterMode(display=False) as counter:
        encode(compiled).sum().backward()
    assert graphs() == 0 and counter.get_total_flops() > 0


def test_names_of_weights_do_not_change_and_a_copy_runs_its_own() -> None:
    eager, compiled = encoders(TINY)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    before, twin = encode(compiled), copy.deepcopy(compiled)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    assert not torch.allclose(encode(twin), before) and torch.equal(encode(compiled), before)


def test_compiled_blocks_under_autocast() -> None:
    eager, compiled = encoders(replace(TINY, activation_checkpointing="full"))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [encode(encoder) for encoder in (eager, compiled)]
        with torch._dynamo.config.patch(error_on_recompile=True):
            encode(compiled, 1).sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0.02, atol=0.02)


def test_unknown_mode_is_an_error() -> None:
    with pytest.raises(ValueError, match="'some'.*'none', 'selective', 'full'"):
        compile_blocks([], "some")  # type: ignore[arg-type]


def gradients_of_two_processes(world: World, strategy: Any) -> dict[str, Any]:
    """Gradients after the second step of eager and of compiled blocks, and the graphs of the latter."""
    settings = DistributedSettings(strategy=strategy, device="cpu", precision="bfloat16")
    results: dict[str, Any] = {}
    pair = encoders(replace(TINY, activation_checkpointing="selective"))
    for name, encoder in zip(("eager", "compiled"), pair, strict=True):
        model = parallelise(encoder, encoder.blocks, world, settings)
        if strategy == "ddp":
            model.bucket_bytes_cap = 1000  # as for a model whose blocks are larger than a bucket
        for step in range(2):  # in the second step the weights are sharded again
            model.zero_grad()
            segments = draw_segments(2 * step + world.rank)
            log_mel = torch.randn(2, FRAMES, 16, generator=torch.Generator().manual_seed(2 * step + world.rank))
            with autocast(world, settings):
                loss = model(log_mel, encoder.layout(segments)).float()[..., ::3].square().sum()
            loss.backward()
            if step == 0:
                torch.optim.SGD(model.parameters(), lr=1e-4).step()
        grads: list[Any] = [parameter.grad for parameter in model.parameters()]
        results[name] = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]
    return results | {"graphs": graphs()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradients_of_two_processes_equal_those_of_eager_blocks(strategy: str) -> None:
    for result in run_distributed(gradients_of_two_processes, 2, strategy):
        assert result["graphs"] == 1
        for actual, expected in zip(result["compiled"], result["eager"], strict=True):
            scale = float(expected.abs().max())
            torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.02 * scale)
