"""Greedy search of a token-and-duration transducer compared with its definition; chunks, times."""

from copy import deepcopy

import pytest
import torch
from tiny_transducer import VOCAB, TableTransducer, make_any, random_frames
from torch import Tensor

from bestrq.decoding.tdt_search import GreedyState, tdt_greedy
from bestrq.decoding.tokens import TimedTokens
from bestrq.decoding.transducer_search import Transducer
from common.errors import UserError

LENGTHS = torch.tensor([24, 0, 1, 13, 24, 7])
DURATIONS = [0, 1, 2, 5]
OUTPUTS = VOCAB + len(DURATIONS)
KINDS = pytest.mark.parametrize("kind", ["table", "stateless", "lstm"])


def search_by_definition(model: Transducer, encoded: Tensor, max_symbols: int) -> tuple[TimedTokens, list[str]]:
    """Tokens of one sequence `[T, J]`, arc by arc, and the kind of each arc."""
    tokens, arcs = TimedTokens([], [], []), []
    predicted, state = model.predict(torch.tensor([0]), model.start(1))
    position = symbols = 0
    while position < len(encoded):
        outputs = model.joint(encoded[position], predicted[0])
        label, duration = int(outputs[:VOCAB].argmax()), DURATIONS[int(outputs[VOCAB:].argmax())]
        if label == 0:
            arcs.append("blank of 0" if duration == 0 else "blank")
            position, symbols = position + max(duration, 1), 0
            continue
        tokens.ids.append(label)
        tokens.confidence.append(float(outputs[:VOCAB].softmax(dim=0)[label]))
        tokens.first_frame.append(position)
        tokens.last_frame.append(min(max(position, position + duration - 1), len(encoded) - 1))
        predicted, state = model.predict(torch.tensor([label]), state)
        symbols += 1
        if duration == 0 and symbols < max_symbols:
            arcs.append("label of 0")
            continue
        arcs.append("full frame" if duration == 0 else "label")
        if position + duration > len(encoded):
            arcs.append("beyond the end")
        position, symbols = position + max(duration, 1), 0
    return tokens, arcs


def search_in_chunks(model: Transducer, encoded: Tensor, chunks: Tensor, max_symbols: int) -> GreedyState:
    """Search chunk by chunk. chunks: lengths, int64 `[C, N]`."""
    state, start = None, torch.zeros_like(chunks[0])
    for lengths in chunks:
        index = (start[:, None] + torch.arange(int(lengths.max()))).clamp(max=encoded.shape[1] - 1)
        chunk = encoded[torch.arange(len(encoded))[:, None], index]
        state = tdt_greedy(model, chunk, lengths, DURATIONS, max_symbols, state)
        start = start + lengths
    assert state is not None
    return state


@pytest.mark.parametrize("max_symbols", [1, 2, 5])
@KINDS
@torch.no_grad()
def test_search_equals_its_definition(kind: str, max_symbols: int) -> None:
    all_arcs: set[str] = set()
    for seed in range(4 if kind == "table" else 1):
        model, encoded = make_any(kind, vocab_size=OUTPUTS, seed=seed), random_frames(len(LENGTHS), 24, OUTPUTS)
        state = tdt_greedy(model, encoded, LENGTHS, DURATIONS, max_symbols)
        for s, length in enumerate(LENGTHS.tolist()):
            expected, arcs = search_by_definition(model, encoded[s, :length], max_symbols)
            assert state.tokens(s) == expected
            assert state.tokens(s).confidence == pytest.approx(expected.confidence, abs=1e-9)
            all_arcs.update(arcs)
        assert state.num_frames.tolist() == LENGTHS.tolist()
    assert kind != "table" or all_arcs >= {"blank of 0", "blank", "full frame", "label", "beyond the end"}
    assert kind != "table" or max_symbols == 1 or "label of 0" in all_arcs


@KINDS
def test_chunks_of_any_lengths_equal_one_pass(kind: str) -> None:
    model, encoded = make_any(kind, vocab_size=OUTPUTS), random_frames(len(LENGTHS), 24, OUTPUTS)
    whole = tdt_greedy(model, encoded, LENGTHS, DURATIONS, 2)
    has_skips = False
    for seed in range(5):
        # Cuts differ between sequences; some chunks are empty, some shorter than a duration.
        cuts = torch.rand(7, len(LENGTHS), generator=torch.Generator().manual_seed(seed)).sort(dim=0).values
        edges = torch.cat((0 * cuts[:1], cuts, 0 * cuts[:1] + 1)) * LENGTHS
        chunked = search_in_chunks(model, encoded, edges.long().diff(dim=0), 2)
        assert chunked.emitted == whole.emitted
        assert torch.equal(chunked.skipped, whole.skipped)
        torch.testing.assert_close(chunked.predicted, whole.predicted, rtol=0, atol=1e-12)
        has_skips |= bool((search_in_chunks(model, encoded, edges.long().diff(dim=0)[:3], 2).skipped > 1).any())
    assert has_skips


def test_a_state_is_not_modified_when_the_search_continues() -> None:
    model, encoded = TableTransducer(OUTPUTS), random_frames(2, 12, OUTPUTS)
    state = tdt_greedy(model, encoded, torch.tensor([12, 12]), DURATIONS, 2)
    tokens, skipped, predicted = deepcopy(state.tokens(0)), state.skipped.clone(), state.predicted.clone()
    tdt_greedy(model, encoded, torch.tensor([12, 12]), DURATIONS, 2, state)
    assert state.tokens(0) == tokens and len(tokens.ids) > 2
    assert torch.equal(state.skipped, skipped) and torch.equal(state.predicted, predicted)


def test_wrong_settings_and_states_are_refused() -> None:
    model, encoded = TableTransducer(OUTPUTS), random_frames(2, 3, OUTPUTS)
    lengths = torch.tensor([3, 3])
    with pytest.raises(UserError, match=r"decoder\.max_symbols is 0"):
        tdt_greedy(model, encoded, lengths, DURATIONS, 0)
    with pytest.raises(UserError, match=r"transducer\.durations is \[1, 2\]"):
        tdt_greedy(model, encoded, lengths, [1, 2], 1)
    state = tdt_greedy(model, encoded[:1], lengths[:1], DURATIONS, 1)
    with pytest.raises(ValueError, match="the state has 1 sequences, the input 2"):
        tdt_greedy(model, encoded, lengths, DURATIONS, 1, state)
