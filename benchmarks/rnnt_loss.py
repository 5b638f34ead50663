"""Transducer loss against other implementations: time and peak memory of loss and gradients, joint network included.

    python -m benchmarks.rnnt_loss        # installation of the other systems: benchmarks.rnnt_loss_peers

A pass goes from the projected frames `[B, T, J]` and states `[B, U + 1, J]` through the joint network (add, tanh,
output matrix) to the summed loss, and back to the gradients of both and of the output weights. `ours` computes the
whole lattice in slices, `ours_pruned` and `fast_rnnt_pruned` only bands of `--band` states, selected by a small joint
network whose loss and gradients are included. All others take the outputs of the whole lattice. In bfloat16 all systems
run under autocast, with float32 losses. Inputs are random and equal for all, and the losses must agree.

Our backward pass skips states through which no alignment has a weight above rounding errors; `ours_states_share` is the
remaining share of the cells. It decreases during training; random inputs are near the worst case. `ours_all_cells`
computes all cells.

Every system runs in a separate process; systems alternate in every round. Memory is the peak resident size during the
first pass (after a warm-up on a small problem), minus that before it, which includes inputs and weights. The fastest
pass counts, and the highest peak. The address space of a system may grow by at most `--budget-gb`; otherwise it "does
not fit". At vocabulary sizes after the first only ours and torchaudio run, in float32. `warprnnt_numba` takes minutes
at the full size and runs only if --systems names it.

The systems with `tdt` in their names compute the token-and-duration transducer, in float32: `transformers_tdt` as in
its Parakeet models, `ours_tdt` in slices of `--tdt-slice-bytes`, and `ours_tdt_outputs` from the outputs of the whole
lattice by `losses.dense`, which has the arguments of transformers. The last line is JSON:

    memory_ratio_to_torchaudio         peak memory, ours / torchaudio, at the first vocabulary size in float32
    time_ratio_to_torchaudio           the same for time; processor_ratio_to_torchaudio for processor time, which
                                       depends less on other programs on the machine (use --threads 1)
    memory_ratio_to_transformers_tdt   the same of ours_tdt / transformers_tdt; also time_ratio and processor_ratio, and
                                       outputs_..._ratio of ours_tdt_outputs
    tdt_matmul_share                   lower bound of the processor time of the products that ours_tdt needs (all cells
                                       forward, ours_tdt_states_share of them backward) as a share of its own
    pruned_gain                        processor time of ours / that of ours_pruned, same size
    matmul_share                       lower bound of the processor time of the matrix products (4 per cell, at the rate
                                       of plain products of the same shapes) as a share of ours_all_cells, same size
    DTYPE_V_SYSTEM_seconds             per system; also _processor_seconds and _peak_mb; null if it does not fit
"""

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.machine import hardware_precision, print_figures
from benchmarks.rnnt_loss_peers import DURATIONS, PEERS, Problem, unavailable_reason
from bestrq.recognition.losses import dense
from bestrq.recognition.losses import transducer as ours
from bestrq.recognition.losses.lattices import Lattices
from bestrq.recognition.losses.pruning import SimpleJoint
from bestrq.recognition.losses.tdt import tdt_loss
from bestrq.recognition.losses.transducer import transducer_loss
from bestrq.recognition.transducer import TransducerSettings
from bestrq.training.machine import keep_freed_memory
from bestrq.training.memory import reset_peak, resident_bytes

OURS = ["ours", "ours_all_cells", "ours_pruned", "ours_tdt", "ours_tdt_outputs"]
COMPARISONS = [
    ("", "ours", "torchaudio"),
    ("", "ours_tdt", "transformers_tdt"),
    ("outputs_", "ours_tdt_outputs", "transformers_tdt"),
]
"""prefix of the ratios' names, our system, the other one"""
OUT_OF_MEMORY = ["memory", "aten::empty", "aten::zeros", "aten::new_"]
"""words in the errors of torch, and of torchaudio, which names the failed allocation call"""
FRAMES_PER_SECOND = 25
"""encoder frames at a stride of 4"""


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    system: str
    dtype: str
    vocab_size: int
    segments: int
    frames: int
    labels: int
    joint_dim: int
    band: int
    slice_bytes: int

    @property
    def name(self) -> str:
        return f"{self.dtype}_{self.vocab_size}_{self.system}"


@dataclass(frozen=True)
class Cost:
    """Cost of a pass."""

    seconds: float
    processor: float
    """seconds summed over all threads"""
    megabytes: float
    loss: float

    def best(self, other: "Cost | None") -> "Cost":
        """Return the fastest time and the highest peak of both."""
        if other is None:
            return self
        seconds, processor = min(self.seconds, other.seconds), min(self.processor, other.processor)
        return Cost(seconds, processor, max(self.megabytes, other.megabytes), self.loss)


def draw_problem(cell: Cell, frames: int, labels: int) -> Problem:
    """Random problem, the same for all systems."""
    torch.manual_seed(0)
    output, acoustic, language = (nn.Linear(cell.joint_dim, cell.vocab_size) for _ in range(3))
    encoded = torch.randn(cell.segments, frames, cell.joint_dim, requires_grad=True)
    predicted = torch.randn(cell.segments, labels + 1, cell.joint_dim, requires_grad=True)
    drawn = torch.randint(1, cell.vocab_size, (cell.segments, labels))
    durations = nn.Linear(cell.joint_dim, len(DURATIONS))
    return Problem(encoded, predicted, drawn, output, acoustic, language, cell.band, durations)


def our_loss(problem: Problem, cell: Cell) -> Tensor:
    """Loss as in `TransducerModel`, or of the outputs of the joint network."""
    if cell.system == "ours_tdt_outputs":
        return dense.tdt_loss(**problem.tdt_arguments())
    frames, states = problem.encoded.flatten(0, 1), problem.predicted.flatten(0, 1)
    lattices = Lattices([problem.encoded.shape[1]] * len(problem.labels), list(problem.labels))
    simple_sum = frames.new_zeros(())
    if cell.system == "ours_pruned":
        simple = SimpleJoint(cell.joint_dim, cell.joint_dim, cell.vocab_size)
        simple.encoder_output, simple.prediction_output = problem.acoustic, problem.language
        losses, lattices = simple(frames, states, lattices, cell.band)
        simple_sum = losses.sum()
    dtype = getattr(torch, cell.dtype)
    weight, bias = problem.output.weight.to(dtype), problem.output.bias.to(dtype)
    if cell.system == "ours_tdt":
        weight = torch.cat((weight, problem.durations.weight.to(dtype)))
        bias = torch.cat((bias, problem.durations.bias.to(dtype)))
        joint = (frames.to(dtype), states.to(dtype), weight, bias, lattices)
        return tdt_loss(*joint, DURATIONS, cell.slice_bytes).sum()
    losses = transducer_loss(frames.to(dtype), states.to(dtype), weight, bias, lattices, cell.slice_bytes)
    return losses.sum() + simple_sum


def one_pass(cell: Cell, frames: int, labels: int) -> Cost:
    """Measure loss and all gradients of a problem of this size."""
    problem = draw_problem(cell, frames, labels)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=cell.dtype == "bfloat16")
    reset_peak()
    before, start, processor = resident_bytes("VmRSS"), time.perf_counter(), time.process_time()
    with autocast:
        loss = our_loss(problem, cell) if cell.system in OURS else PEERS[cell.system](problem)
    loss.backward()
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    return Cost(seconds, processor, (resident_bytes("VmHWM") - before) / 1e6, loss.item())


def measure(cell: Cell, repeats: int, threads: int, budget: int) -> Cost | None:
    """Measure a cell; None if it needs more than `budget` bytes. Must run in a new process, for the memory figures."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    all_cells = mock.patch.object(ours, "_visited_states", lambda flow: torch.tensor([0, flow.shape[1]]))
    if cell.system == "ours_all_cells":
        all_cells.start()
    one_pass(cell, 2, 2)
    resource.setrlimit(resource.RLIMIT_AS, (resident_bytes("VmSize") + budget, resource.RLIM_INFINITY))
    costs: list[Cost] = []
    try:
        while len(costs) < repeats:
            costs.append(one_pass(cell, cell.frames, cell.labels))
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(word in str(error) for word in OUT_OF_MEMORY):
            raise
    if not costs:  # a later pass may not fit between the remains of the first
        return None
    # Later passes reuse memory that the first left to the allocator, so the first pass has the real peak.
    seconds, processor = min(cost.seconds for cost in costs), min(cost.processor for cost in costs)
    return Cost(seconds, processor, costs[0].megabytes, costs[0].loss)


def states_share(cell: Cell) -> float:
    """Share of the cells that our backward pass computes."""
    problem, shares = draw_problem(cell, cell.frames, cell.labels), []
    visited_states = ours._visited_states

    def counted(flow: Tensor) -> Tensor:
        span = visited_states(flow)
        shares.append((int(span.diff()) * len(flow), flow.numel()))
        return span

    with mock.patch.object(ours, "_visited_states", counted):
        our_loss(problem, cell).backward()
    return sum(share for share, _ in shares) / sum(total for _, total in shares)


def matmul_seconds(cell: Cell, rows: int = 1024) -> list[float]:
    """Lower bound of the time of the matrix products of a pass over all cells: outputs, computed forward and again in
    backward, and two gradients."""
    dtype = getattr(torch, cell.dtype)
    hidden, weight = (
        torch.randn(rows, cell.joint_dim, dtype=dtype),
        torch.randn(cell.vocab_size, cell.joint_dim).to(dtype),
    )
    logits, seconds = hidden @ weight.mT, []

    def outputs() -> Tensor:
        return hidden @ weight.mT

    for product in (outputs, outputs, lambda: logits @ weight, lambda: logits.mT @ hidden):
        best = float("inf")
        for _ in range(10):
            start = time.process_time()
            product()
            best = min(best, time.process_time() - start)
        seconds.append(best / rows * cell.segments * cell.frames * (cell.labels + 1))
    return seconds


def plan(args: argparse.Namespace) -> list[Cell]:
    """Cells to run, in the order of a round."""
    cells = []
    for number, vocab_size in enumerate(args.vocab_sizes):
        for dtype in args.dtypes[: None if number == 0 else 1]:
            for system in args.systems:
                first = number == 0 and (dtype == args.dtypes[0] or "tdt" not in system)
                if first or system in ("ours", "torchaudio"):
                    sizes = (args.segments, args.frames, args.labels, args.joint_dim, args.band)
                    slice_bytes = args.tdt_slice_bytes if "tdt" in system else args.slice_bytes
                    cells.append(Cell(system, dtype, vocab_size, *sizes, slice_bytes))
    return cells


def ratios(args: argparse.Namespace, costs: dict[str, Cost | None]) -> dict[str, float]:
    """Ratios between the systems that ran."""

    def cost(system: str) -> Cost | None:
        return costs.get(f"{args.dtypes[0]}_{args.vocab_sizes[0]}_{system}")

    result: dict[str, float] = {}
    own, pruned, whole, tdt = map(cost, ("ours", "ours_pruned", "ours_all_cells", "ours_tdt"))
    for prefix, name, peer in COMPARISONS:
        ours_cost, theirs = cost(name), cost(peer)
        if ours_cost and theirs:
            result[f"{prefix}memory_ratio_to_{peer}"] = ours_cost.megabytes / theirs.megabytes
            result[f"{prefix}time_ratio_to_{peer}"] = ours_cost.seconds / theirs.seconds
            result[f"{prefix}processor_ratio_to_{peer}"] = ours_cost.processor / theirs.processor
    if own and pruned:
        result["pruned_gain"] = own.processor / pruned.processor
    first = replace(plan(args)[0], system="ours")
    if whole:
        result["matmul_share"] = sum(matmul_seconds(first)) / whole.processor
    if tdt:
        forward, *backward = matmul_seconds(first)
        share = states_share(replace(first, system="ours_tdt", slice_bytes=args.tdt_slice_bytes))
        result["tdt_matmul_share"] = (forward + share * sum(backward)) / tdt.processor
        result["ours_tdt_states_share"] = share
    result["ours_states_share"] = states_share(first)
    return result


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [*OURS, *(name for name in PEERS if name != "warprnnt_numba")]
    parser.add_argument("--systems", nargs="+", choices=[*OURS, *PEERS], default=default)
    dtypes = ["float32", "bfloat16"] if hardware_precision() == "bfloat16" else ["float32"]
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=dtypes)
    parser.add_argument("--segments", type=int, default=8, help="B, number of segments")
    parser.add_argument("--frames", type=int, default=500, help="T, frames per segment")
    parser.add_argument("--labels", type=int, default=100, help="U, labels per segment")
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[1024, 4096], help="V")
    parser.add_argument("--joint-dim", type=int, default=512, help="J, joint width")
    parser.add_argument("--band", type=int, default=5, help="states per frame, for pruning")
    parser.add_argument(
        "--slice-bytes", type=int, default=TransducerSettings.slice_bytes, help="memory per slice of ours"
    )
    parser.add_argument("--tdt-slice-bytes", type=int, default=16 * 2**20, help="the same for TDT")
    parser.add_argument("--budget-gb", type=float, default=12.0, help="memory limit of a pass, for every system")
    parser.add_argument("--repeats", type=int, default=2, help="passes per system and round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    reasons = {system: unavailable_reason(system) for system in args.systems}
    print(*filter(None, reasons.values()), sep="\n", end="\n" if any(reasons.values()) else "")
    args.systems = [system for system, reason in reasons.items() if reason is None]
    torch.set_num_threads(args.threads)
    costs: dict[str, Cost | None] = {}
    context = multiprocessing.get_context("spawn")
    for _ in range(args.rounds):
        for cell in plan(args):
            with ProcessPoolExecutor(1, mp_context=context) as process:
                budget = int(args.budget_gb * 1e9)
                cost = process.submit(measure, cell, args.repeats, args.threads, budget).result()
            costs[cell.name] = cost.best(costs.get(cell.name)) if cost else None
            line = (
                f"{cost.seconds:8.2f} s {cost.processor:8.2f} CPU-s {cost.megabytes:9.1f} MB  loss {cost.loss:.2f}"
                if cost
                else "does not fit"
            )
            print(f"{cell.name:36} {line}", flush=True)
    check_losses(costs)
    result: dict[str, object] = {key: round(value, 4) for key, value in ratios(args, costs).items()}
    result |= {"audio_seconds": args.segments * args.frames / FRAMES_PER_SECOND, "budget_gb": args.budget_gb}
    for name, cost in costs.items():
        result[f"{name}_seconds"] = round(cost.seconds, 4) if cost else None
        result[f"{name}_processor_seconds"] = round(cost.processor, 4) if cost else None
        result[f"{name}_peak_mb"] = round(cost.megabytes, 1) if cost else None
    print_figures(result, " and ".join(args.dtypes), args.threads)


def check_losses(costs: dict[str, Cost | None]) -> None:
    """Raise RuntimeError if systems with the whole lattice have different losses: their timings are not comparable."""
    groups: dict[str, list[float]] = {}
    for name, cost in costs.items():
        if cost and not name.endswith("_pruned"):
            kind = "tdt" if "tdt" in name else "rnnt"
            groups.setdefault("_".join([*name.split("_")[:2], kind]), []).append(cost.loss)
    for name, losses in groups.items():
        if max(losses) > 1.01 * min(losses):
            raise RuntimeError(f"{name}: the losses differ: {losses}")


if __name__ == "__main__":
    main()
