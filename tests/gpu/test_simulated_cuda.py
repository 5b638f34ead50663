"""The simulated GPU has CUDA's rules of placement, counts the waits of the host, and computes what the CPU computes."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.training.process import DistributedSettings, start_world
from tests.gpu.cuda_kernels import attention
from tests.gpu.simulated_cuda import CudaTensor, SimulatedCuda, simulated_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: tests marked cuda use it")


@pytest.fixture
def gpu() -> Iterator[SimulatedCuda]:
    with simulated_cuda() as gpu:
        yield gpu


def on_device(*shape: int) -> Tensor:
    """Random tensor on the device; its copy is not counted."""
    tensor = torch.randn(*shape)
    return tensor.to("cuda", non_blocking=True)


# ---- Placement ----


def test_a_new_tensor_takes_the_shape_of_one_of_the_cpu(gpu: SimulatedCuda) -> None:
    made = [torch.zeros_like(torch.ones(2), device="cuda"), torch.ones(2).new_zeros(2, device="cuda")]
    assert all(tensor.is_cuda and tensor.tolist() == [0, 0] for tensor in made)


def test_tensors_report_the_device(gpu: SimulatedCuda) -> None:
    made = [torch.zeros(2, device="cuda"), torch.arange(3, device="cuda"), torch.tensor([1, 2], device="cuda"),
            torch.randn(2, 3).to("cuda"), torch.randn(2).cuda(), nn.Linear(2, 2).to("cuda").weight]  # fmt: skip
    made += [made[0] + 1, made[3].t(), made[3].detach(), torch.empty_like(made[3]), made[3].new_zeros(2)]
    for tensor in made:
        assert isinstance(tensor, CudaTensor) and tensor.is_cuda and tensor.device == torch.device("cuda", 0)
    assert not made[0].cpu().is_cuda and type(made[0].to("cpu")) is Tensor


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.ones(3) * x,
        lambda x: torch.cat((x, torch.ones(3))),
        lambda x: torch.where(torch.ones(3, dtype=torch.bool), x, 0.0),
        lambda x: x.gather(0, torch.zeros(1, dtype=torch.int64)),
        lambda x: x.index_select(0, torch.zeros(1, dtype=torch.int64)),
        lambda x: x.masked_fill(torch.ones(3, dtype=torch.bool), 0.0),
        lambda x: F.embedding(torch.zeros(1, dtype=torch.int64), x[:, None]),
        lambda x: torch.ones(3)[x.long()],
        lambda x: torch.stack((x.sum(), torch.ones(()))),
        lambda x: torch.zeros(()).add_(x.sum()),
        lambda x: x.index_put_((x.long() * 0,), torch.ones(3)),
        lambda x: torch.add(x, x, out=torch.ones(3)),
        lambda x: nn.Linear(3, 3)(x),
    ],
)
def test_a_cpu_tensor_beside_tensors_of_the_device_is_refused(mixed: Callable[[Tensor], Any], gpu: Any) -> None:
    x = on_device(3)
    with pytest.raises(RuntimeError, match="on the same device|on cpu"):
        mixed(x)
    mixed_on_cpu = x.cpu()
    mixed(mixed_on_cpu)  # valid on one device


def test_a_scalar_of_the_cpu_is_accepted_where_cuda_accepts_it(gpu: SimulatedCuda) -> None:
    x, two = on_device(3), torch.tensor(2.0)
    results = [x * two, two * x, torch.where(x > 0, two, x), x.masked_fill(x > 0, two), x.clone().fill_(two), x + 1]
    assert all(isinstance(result, CudaTensor) for result in results)
    assert gpu.num_waits == 0


def test_a_tensor_of_the_device_has_no_numpy_array(gpu: SimulatedCuda) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        on_device(3).numpy()


# ---- Waits ----


READS: dict[str, tuple[int, Callable[[Tensor], Any]]] = {
    "item": (1, lambda x: x[0].item()),
    "float": (1, lambda x: float(x.sum())),
    "bool": (1, lambda x: bool((x > 0).any())),
    "if": (1, lambda x: 1 if (x > 0).all() else 0),
    "tolist": (1, lambda x: x.tolist()),
    "cpu": (1, lambda x: x.cpu()),
    "to": (1, lambda x: x.to("cpu", torch.float64)),
    "to_copy_of_the_cpu": (1, lambda x: torch.empty(3).copy_(x)),
    "to_copy_of_pageable_memory": (1, lambda x: torch.empty(3).copy_(x, non_blocking=True)),
    "to_non_blocking": (0, lambda x: x.to("cpu", non_blocking=True)),
    "nonzero": (1, lambda x: x.nonzero()),
    "nonzero_tuple": (1, lambda x: x.nonzero(as_tuple=True)),
    "where": (1, lambda x: torch.where(x > 0)),
    "mask": (1, lambda x: x[x > 0]),
    "mask_and_values": (1, lambda x: x.index_put_((x > 0,), x[:1])),
    "mask_and_scalar": (0, lambda x: x.index_put_((x > 0,), torch.tensor(0.0))),
    "setitem_mask": (0, lambda x: x.__setitem__(x > 0, 0.0)),
    "setitem_scalar": (1, lambda x: x.__setitem__(0, 0.0)),
    "setitem_slice": (0, lambda x: x.__setitem__(slice(0, 2), 0.0)),
    "cpu_mask": (1, lambda x: x[torch.tensor([True, False, True])]),
    "cpu_mask_of_two_dimensions": (2, lambda x: x[None][torch.tensor([[True, False, True]])]),
    "cpu_index": (1, lambda x: x[torch.tensor([0, 2])]),
    "list": (1, lambda x: x[[0, 2]]),
    "two_lists": (2, lambda x: x[None][[0, 0], [1, 2]]),
    "set_by_list": (1, lambda x: x.__setitem__([0, 1], x[:2].clone())),
    "scalar_index": (0, lambda x: x[1]),
    "index_of_the_device": (0, lambda x: x[torch.zeros_like(x, dtype=torch.int64)]),
    "masked_select": (1, lambda x: x.masked_select(x > 0)),
    "masked_fill": (0, lambda x: x.masked_fill(x > 0, 0.0)),
    "unique": (1, lambda x: x.unique()),
    "bincount": (2, lambda x: x.long().abs().bincount()),
    "equal": (1, lambda x: torch.equal(x, x)),
    "repeats": (2, lambda x: x.repeat_interleave(torch.ones_like(x, dtype=torch.int64))),
    "repeats_of_known_size": (
        0, lambda x: x.repeat_interleave(torch.ones_like(x, dtype=torch.int64), output_size=3)
    ),
    "synchronize": (1, lambda x: torch.cuda.synchronize()),
    "event": (1, lambda x: torch.cuda.Event().synchronize()),
    "to_the_device": (1, lambda x: torch.ones(3).to("cuda")),
    "tensor_on_the_device": (1, lambda x: torch.tensor([1.0], device="cuda")),
    "made_on_the_device": (0, lambda x: (torch.ones(3, device="cuda"), torch.full((2,), 1.5, device="cuda"))),
    "pinned_blocking": (1, lambda x: torch.ones(3).pin_memory().to("cuda")),
    "pinned": (0, lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True)),
    "pageable": (0, lambda x: torch.ones(3).to("cuda", non_blocking=True)),
    "of_one_device": (0, lambda x: x.to("cuda").double().copy_(x)),
    "on_the_cpu": (0, lambda x: torch.ones(3)[torch.ones(3) > 0].sum().item()),
    "eigh": (1, lambda x: torch.linalg.eigh(x[:, None] * x)),
    "products": (0, lambda x: (x[:, None] @ x[None]).softmax(-1).argmax(-1)),
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
def test_waits_are_counted(name: str, gpu: SimulatedCuda) -> None:
    expected, read = READS[name]
    x = on_device(3)
    read(x)
    assert gpu.num_waits == expected, gpu.waits


def test_waits_inside_the_ctc_loss_are_counted(gpu: SimulatedCuda) -> None:
    """Two copies of labels to the host (for MIOpen), three of lengths and offsets to the device, in both directions."""
    log_probs, labels = on_device(6, 1, 4).requires_grad_(), torch.ones(1, 2, dtype=torch.int64, device="cuda")
    for device, reads in (("cpu", 0), ("cuda", 2)):
        lengths = torch.full((1,), 6, device=device), torch.full((1,), 2, device=device)
        before = gpu.num_waits
        loss = F.ctc_loss(log_probs.log_softmax(-1), labels, *lengths, reduction="sum")
        assert gpu.num_waits - before == 2 + 3 + reads
        loss.backward()
        assert gpu.num_waits - before == 2 + 6 + reads


def test_a_copy_from_pageable_memory_is_counted_apart(gpu: SimulatedCuda) -> None:
    batch = torch.ones(4)
    batch.to("cuda", non_blocking=True)
    assert sum(gpu.pageable.values()) == 1
    pinned = batch.pin_memory()
    assert pinned.is_pinned() and pinned[1:].is_pinned() and not batch.is_pinned()
    pinned[1:].to("cuda", non_blocking=True)
    assert torch.empty(2, pin_memory=True).is_pinned()
    assert sum(gpu.pageable.values()) == 1 and gpu.num_waits == 0
    batch.to("cuda")
    pinned.to("cuda")
    reasons = [reason for reason, _ in gpu.waits]
    assert reasons == ["blocking copy to the device, from pageable memory", "blocking copy to the device"]


def test_an_asynchronous_copy_to_the_host_needs_pinned_memory(gpu: SimulatedCuda) -> None:
    x = on_device(3)
    buffer = torch.empty(3).pin_memory()
    buffer.copy_(x, non_blocking=True)
    assert x.to("cpu", non_blocking=True).is_pinned() and gpu.num_waits == 0


def test_a_wait_has_its_place(gpu: SimulatedCuda) -> None:
    x = on_device(3)
    float(x.sum())
    [(reason, where)] = gpu.waits
    line = test_a_wait_has_its_place.__code__.co_firstlineno + 2
    assert where == f"tests/gpu/test_simulated_cuda.py:{line} test_a_wait_has_its_place"


class Read(torch.autograd.Function):
    """Identity that reads a value in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        float(grads[0].sum())
        return grads[0]


def test_waits_of_a_backward_pass_are_counted(gpu: SimulatedCuda) -> None:
    x = on_device(3).requires_grad_()
    Read.apply(x).sum().backward()
    [(_, where)] = gpu.waits
    assert where.endswith(" backward")


def test_waits_of_another_thread_are_counted(gpu: SimulatedCuda) -> None:
    x = on_device(3)
    thread = threading.Thread(target=lambda: x.cpu())
    thread.start()
    thread.join()
    assert gpu.num_waits == 1


# ---- Results ----


def test_gradients_are_those_of_the_cpu(gpu: SimulatedCuda) -> None:
    """Convolution, norms, views, in-place writes, recurrent layers, complex products, an optimizer step."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv1d(4, 6, 3, padding=1), nn.LayerNorm(6)
            self.lstm, self.linear = nn.LSTM(6, 6, 2, batch_first=True), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.convolution(x).transpose(1, 2))
            x = x + self.lstm(x)[0]
            phase = torch.polar(torch.ones(3, device=x.device), torch.arange(3, device=x.device).float())
            turned = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (3, 2))) * phase).flatten(-2)
            out = torch.zeros_like(turned)
            out[:, 1:] = F.silu(self.linear(turned))[:, :-1]
            return out.logsumexp(-1).mean()

    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = Model().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
        x = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        loss = model(x)
        loss.backward()
        assert x.grad is not None
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        results.append([loss.detach(), x.grad, norm, *(p.detach() for p in model.parameters())])
    for ours, reference in zip(results[1], results[0], strict=True):
        # AdamW divides small gradients by their own size, which enlarges the differences of their rounding.
        torch.testing.assert_close(ours.cpu(), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_attention_is_that_of_torch(mask: str | None) -> None:
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    allowed = torch.rand(2, 1, 5, 7) > 0.4
    allowed[..., 0] = True
    given = {None: None, "bool": allowed, "float": torch.randn(2, 4, 5, 7)}[mask]
    reference = F.scaled_dot_product_attention(query, key, value, given, enable_gqa=True)
    torch.testing.assert_close(attention(query, key, value, given, enable_gqa=True), reference)
    with pytest.raises(RuntimeError, match="dtype"):
        attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), torch.randn(2, 4, 5, 7))


def test_autocast_of_cuda_applies(gpu: SimulatedCuda) -> None:
    linear, x = nn.Linear(3, 3).to("cuda"), on_device(2, 3)
    with torch.autocast("cuda", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
        assert F.layer_norm(linear(x), (3,)).dtype == torch.float32  # bfloat16 on a CPU
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.float32


def test_dropout_is_drawn_on_the_device(gpu: SimulatedCuda) -> None:
    kept = F.dropout(torch.ones(1000, device="cuda"), 0.25)
    assert isinstance(kept, CudaTensor) and 0.7 < (kept.content > 0).float().mean() < 0.8


def test_generators_of_the_device_draw_the_numbers_of_the_cpu(gpu: SimulatedCuda) -> None:
    drawn = torch.zeros(5, device="cuda").normal_(generator=torch.Generator("cuda").manual_seed(3))
    assert torch.equal(drawn.cpu(), torch.zeros(5).normal_(generator=torch.Generator().manual_seed(3)))


def test_a_segment_for_which_torchaudio_writes_no_cost_is_not_a_number(gpu: SimulatedCuda) -> None:
    """Segments of no label or of one frame."""
    import torchaudio

    lattices = torch.randn(3, 4, 3, 5).log_softmax(-1)
    sizes = torch.tensor([4, 1, 4], dtype=torch.int32), torch.tensor([2, 2, 0], dtype=torch.int32)
    targets = torch.ones(3, 2, dtype=torch.int32)
    costs = [
        torchaudio.functional.rnnt_loss(
            lattices.to(device), targets.to(device), sizes[0].to(device), sizes[1].to(device), blank=0, reduction="none"
        ).cpu() for device in ("cpu", "cuda")
    ]  # fmt: skip
    assert costs[0].isfinite().all() and costs[1].isfinite().tolist() == [True, False, False]
    assert costs[0][0] == costs[1][0]


def test_start_world_selects_the_simulated_device(gpu: SimulatedCuda) -> None:
    assert start_world(DistributedSettings()).device == torch.device("cuda", 0)


def test_everything_is_restored() -> None:
    names = ("is_available", "device_count", "synchronize", "_lazy_init")
    before = [getattr(torch.cuda, name) for name in names] + [torch.Generator, F.scaled_dot_product_attention]
    methods = [torch.Tensor.pin_memory, torch.Tensor.is_pinned, torch.Tensor.record_stream]
    with simulated_cuda():
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available()
    assert before == [getattr(torch.cuda, name) for name in names] + [torch.Generator, F.scaled_dot_product_attention]
    assert methods == [torch.Tensor.pin_memory, torch.Tensor.is_pinned, torch.Tensor.record_stream]
    assert torch.backends.cudnn.enabled and torch.autograd.is_multithreading_enabled()
    x = torch.randn(3, requires_grad=True)
    (x * 2).sum().backward()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")
