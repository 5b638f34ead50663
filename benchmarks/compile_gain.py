"""Gain and cost of torch.compile by module: forward and backward in the precision of the hardware.

    python -m benchmarks.compile_gain         # needs a C++ compiler on a CPU

Modules of `base-120m` in training mode, dropout included, on packed rows of one fixed shape. Each is timed eagerly and
compiled (`torch.compile(module, dynamic=False)`), alternating; the fastest of the repeats counts. The time of
compilation is the time of the first pass minus that of a later one, without torch's caches on disk. Code that Dynamo
cannot trace breaks the graph and runs eagerly; graphs and breaks are counted. Two parts are excluded from the graphs:
the loop of attention over segments, which would be compiled again for every length, and the random numbers of dropout,
whose 64-bit arithmetic raises an OverflowError in the CPU code of torch 2.14; `--dropout 0` measures without them. The
last line is JSON:

    MODULE_eager, MODULE_compiled    seconds of a forward and backward pass
    MODULE_gain                      eager / compiled: above 1, compilation is faster
    MODULE_compile_seconds           once per process
    MODULE_graphs, MODULE_breaks     compiled graphs, and graph breaks
    block_updates_to_pay             passes that amortise the compilation of a block; -1 for never
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks.machine import hardware_autocast, hardware_dtype, hardware_precision, print_figures
from bestrq.model.attention.module import ATTEND
from bestrq.model.conformer import ConformerBlock, ConformerEncoder
from bestrq.model.cpu import dropout
from bestrq.model.presets import PRESETS
from common.segments import Segments

GAP = 1
"""encoder frames between two segments"""


def time_pass(module: Callable[..., Tensor], weights: nn.Module, x: Tensor, *layout: object) -> float:
    """Seconds of a forward and backward pass, with the gradient of the input unless it is the log-mel."""
    x = x.detach().requires_grad_(x.requires_grad)
    start = time.perf_counter()
    with hardware_autocast():
        out = module(x, *layout)
    out.backward(torch.ones_like(out))
    seconds = time.perf_counter() - start
    weights.zero_grad(set_to_none=True)
    if not bool(out.isfinite().all()):
        raise RuntimeError("an output is not finite: the timings are invalid")
    return seconds


def compare(module: nn.Module, repeats: int, x: Tensor, *layout: object) -> dict[str, float]:
    """Figures of one module, named as in the module docstring."""
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(module, dynamic=False)
    time_pass(module, module, x, *layout)
    first = time_pass(compiled, module, x, *layout)
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    seconds: dict[str, list[float]] = {"eager": [], "compiled": []}
    for _ in range(repeats):
        seconds["eager"].append(time_pass(module, module, x, *layout))
        seconds["compiled"].append(time_pass(compiled, module, x, *layout))
    if counters["stats"]["unique_graphs"] != graphs:
        raise RuntimeError("recompiled between the repeats: the timings are invalid")
    result = {name: min(times) for name, times in seconds.items()}
    result["gain"] = result["eager"] / result["compiled"]
    result["compile_seconds"] = first - result["compiled"]
    return result | {"graphs": graphs, "breaks": breaks}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="base-120m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[310, 120, 347], help="encoder frames of a row")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.1, help="dropout of all modules, attention weights included")
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch._inductor.config.force_disable_caches = True
    torch.manual_seed(0)
    dropout.random_words = torch.compiler.disable(dropout.random_words)
    ATTEND["segments"] = torch.compiler.disable(ATTEND["segments"])
    encoder = ConformerEncoder(replace(PRESETS[args.preset], dropout=args.dropout, attention_dropout=args.dropout))
    settings, stride = encoder.settings, encoder.settings.stride
    length = torch.tensor([args.lengths] * args.rows)
    start = length.cumsum(dim=1) - length + GAP * torch.arange(len(args.lengths))
    frames = int(start[0, -1] + length[0, -1]) + GAP
    layout = encoder.layout(Segments(start * stride, length * stride, frames * stride))
    stage, block = layout.output, encoder.blocks[-1]
    assert isinstance(block, ConformerBlock)
    x = torch.randn(args.rows, frames, settings.dim).to(hardware_dtype()).requires_grad_()
    log_mel = torch.randn(args.rows, frames * stride, settings.num_mels)
    modules: dict[str, tuple[nn.Module, Tensor, tuple[object, ...]]] = {
        "norm": (block.norm, x, ()),
        "feedforward": (block.feedforward_in, x, ()),
        "attention": (block.attention, x, (stage,)),
        "convolution": (block.convolution, x, (stage,)),
        "block": (block, x, (stage,)),
        "subsampling": (encoder.subsampling, log_mel, (layout,)),
    }
    print(
        f"{args.preset}: {args.rows} rows of {frames} frames, {torch.get_num_threads()} threads, dropout {args.dropout}"
    )
    print(f"{'module':12} {'eager':>8} {'compiled':>8} {'gain':>6} {'compiling':>9}  graphs, breaks")
    results: dict[str, float] = {}
    for name, (module, inputs, others) in modules.items():
        r = compare(module, args.repeats, inputs, *others)
        print(
            f"{name:12} {1e3 * r['eager']:5.1f} ms {1e3 * r['compiled']:5.1f} ms {r['gain']:6.2f} "
            f"{r['compile_seconds']:7.1f} s  {r['graphs']:.0f}, {r['breaks']:.0f}",
            flush=True,
        )
        results |= {f"{name}_{key}": value for key, value in r.items()}
    saved = results["block_eager"] - results["block_compiled"]
    results["block_updates_to_pay"] = results["block_compile_seconds"] / saved if saved > 0 else -1
    print_figures({key: round(value, 4) for key, value in results.items()}, hardware_precision())


if __name__ == "__main__":
    main()
