"""A step of a transducer search has one transfer to the host and one back, whatever the batch.

On a GPU every further transfer would stall the device. The device is imagined (`host_transfers`).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from host_transfers import DEVICE, TO_DEVICE, TO_HOST, DeviceTensor, host_transfers
from tiny_fusion import Bigrams
from tiny_transducer import TableTransducer, random_frames
from torch import Tensor

from bestrq.decoding.fusion import Fusion
from bestrq.decoding.hypotheses import Hypothesis
from bestrq.decoding.tdt_search import tdt_greedy
from bestrq.decoding.tokens import TimedTokens
from bestrq.decoding.transducer_beam import beam_search
from bestrq.decoding.transducer_search import PredictionState, Transducer, greedy_search

FRAMES = 100
LENGTHS = torch.tensor([FRAMES, 0, 1, 53, FRAMES, 27])
DURATIONS = [0, 1, 2, 5]


class CountedTransducer(TableTransducer):
    """`TableTransducer` on the imagined device, which counts the calls of its joint network: one per step."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.table = DeviceTensor(self.table)
        self.steps = 0

    def start(self, num_sequences: int) -> PredictionState:
        return (torch.zeros(num_sequences, dtype=torch.int64, device=DEVICE),)

    def joint(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        self.steps += 1
        return super().joint(encoded, predicted)


def greedy(model: Transducer, encoded: Tensor, lengths: Tensor, frames: int = FRAMES) -> list[TimedTokens]:
    state = greedy_search(model, encoded[:, :frames], lengths.clamp(max=frames), 3)
    return [state.tokens(n) for n in range(len(lengths))]


def tdt(model: Transducer, encoded: Tensor, lengths: Tensor) -> list[TimedTokens]:
    state = tdt_greedy(model, encoded, lengths, DURATIONS, 3)
    return [state.tokens(n) for n in range(len(lengths))]


def beam(model: Transducer, encoded: Tensor, lengths: Tensor) -> list[list[Hypothesis]]:
    state = beam_search(model, encoded, lengths, 3, 2)
    return [state.hypotheses(n) for n in range(len(lengths))]


def fused_beam(model: Transducer, encoded: Tensor, lengths: Tensor) -> list[list[Hypothesis]]:
    state = beam_search(model, encoded, lengths, 3, 2, Fusion(model.vocab_size, Bigrams(model.vocab_size), 0.5, 0.3))
    return [state.hypotheses(n) for n in range(len(lengths))]


def count(search: Callable[..., Any], encoded: Tensor, lengths: Tensor) -> tuple[Any, int, dict[str, int]]:
    """Result, steps and transfers of a search on the imagined device."""
    model = CountedTransducer(encoded.shape[2])
    with host_transfers() as counts:
        result = search(model, DeviceTensor(encoded), lengths)
    return result, model.steps, counts


@pytest.mark.parametrize(
    ("search", "outputs", "to_device"),
    [(greedy, 5, 1), (tdt, 9, 1), (beam, 5, 1), (fused_beam, 5, 2)],
    ids=["greedy", "tdt", "beam", "fused beam"],
)
def test_a_step_has_one_transfer_to_the_host_and_one_of_indices_back(
    search: Callable[..., Any], outputs: int, to_device: int
) -> None:
    encoded = random_frames(len(LENGTHS), FRAMES, outputs)
    result, steps, counts = count(search, encoded, LENGTHS)
    assert result == search(TableTransducer(outputs), encoded, LENGTHS)
    # Beyond the steps, a search moves its arguments and reads its result, at most once per sequence.
    fixed = len(LENGTHS) + 2
    assert steps > 4 * fixed
    assert steps <= counts[TO_HOST] <= steps + fixed, (counts, steps)
    assert counts[TO_DEVICE] <= to_device * steps + fixed, (counts, steps)


def test_the_transfers_outside_of_the_steps_do_not_depend_on_the_length() -> None:
    encoded = random_frames(len(LENGTHS), FRAMES)
    beyond = []
    for frames in (20, FRAMES):
        _, steps, counts = count(lambda *arguments, n=frames: greedy(*arguments, n), encoded, LENGTHS)
        beyond.append((counts[TO_HOST] - steps, counts[TO_DEVICE] - steps))
    assert beyond[0] == beyond[1] and max(beyond[0]) <= 3


def test_transfers_are_noticed() -> None:
    numbers = torch.arange(4.0)
    to_host: list[Callable[[Tensor], Any]] = [
        lambda x: x.cpu(), lambda x: x.tolist(), lambda x: float(x.sum()), lambda x: bool((x > 1).any()),
        lambda x: x.nonzero(), lambda x: x[x > 1], lambda x: x[0].item(), lambda x: x.to("cpu"),
        lambda x: torch.zeros(4).copy_(x),
    ]  # fmt: skip
    to_device: list[Callable[[Tensor], Any]] = [
        lambda x: torch.ones(3).to(x.device), lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: x[torch.tensor([0, 1])], lambda x: x[[0, 1]], lambda x: x.copy_(torch.ones(4)),
    ]  # fmt: skip
    neither: list[Callable[[Tensor], Any]] = [
        lambda x: x * 2, lambda x: x[1:], lambda x: x[x.long()], lambda x: torch.zeros(3, device=x.device),
        lambda x: torch.ones(3).tolist(), lambda x: x.masked_fill(x > 1, 0.0), lambda x: torch.where(x > 1, x, 4),
    ]  # fmt: skip
    for uses, expected in ((to_host, (1, 0)), (to_device, (0, 1)), (neither, (0, 0))):
        for number, use in enumerate(uses):
            with host_transfers() as counts:
                use(DeviceTensor(numbers.clone()))
            assert (counts[TO_HOST], counts[TO_DEVICE]) == expected, (number, expected)
