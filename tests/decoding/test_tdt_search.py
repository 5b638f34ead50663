"""Greedy search of a token-and-duration transducer against its definition, frame by frame; chunks and times."""

from copy import deepcopy

import pytest
import torch
from tiny_transducer import VOCAB, TableTransducer, make_any, random_frames
from torch import Tensor

from bestrq.decoding.tdt_search import TDTState, tdt_greedy
from bestrq.decoding.tokens import TimedTokens
from bestrq.decoding.transducer_search import Transducer
from common.errors import UserError

LENGTHS = torch.tensor([24, 0, 1, 13, 24, 7])
DURATIONS = [0, 1, 2, 5]
OUTPUTS = VOCAB + len(DURATIONS)
KINDS = pytest.mark.parametrize("kind", ["table", "stateless", "lstm"])


def search_by_definition(model: Transducer, encoded: Tensor, max_symbols: int) -> tuple[TimedTokens, list[str]]:
    """One sequence `[T, J]`, one arc after the other; and what each arc did."""
    tokens, arcs = TimedTokens([], [], []), []
    predicted, state = model.predict(torch.tensor([0]), model.start(1))
    place = symbols = 0
    while place < len(encoded):
        outputs = model.joint(encoded[place], predicted[0])
        label, duration = int(outputs[:VOCAB].argmax()), DURATIONS[int(outputs[VOCAB:].argmax())]
        if label == 0:
            arcs.append("blank of 0" if duration == 0 else "blank")
            place, symbols = place + max(duration, 1), 0
            continue
        tokens.ids.append(label)
        tokens.confidence.append(float(outputs[:VOCAB].softmax(dim=0)[label]))
        tokens.first_frame.append(place)
        tokens.last_frame.append(min(max(place, place + duration - 1), len(encoded) - 1))
        predicted, state = model.predict(torch.tensor([label]), state)
        symbols += 1
        if duration == 0 and symbols < max_symbols:
            arcs.append("label of 0")
            continue
        arcs.append("full frame" if duration == 0 else "label")
        if place + duration > len(encoded):
            arcs.append("beyond the end")
        place, symbols = place + max(duration, 1), 0
    return tokens, arcs


def search_in_chunks(model: Transducer, encoded: Tensor, chunks: Tensor, max_symbols: int) -> TDTState:
    """Chunk lengths int64 `[C, N]`."""
    state, begin = None, torch.zeros_like(chunks[0])
    for lengths in chunks:
        index = (begin[:, None] + torch.arange(int(lengths.max()))).clamp(max=encoded.shape[1] - 1)
        chunk = encoded[torch.arange(len(encoded))[:, None], index]
        state = tdt_greedy(model, chunk, lengths, DURATIONS, max_symbols, state)
        begin = begin + lengths
    assert state is not None
    return state


@pytest.mark.parametrize("max_symbols", [1, 2, 5])
@KINDS
@torch.no_grad()
def test_it_is_greedy_search_by_definition(kind: str, max_symbols: int) -> None:
    happened: set[str] = set()
    for seed in range(4 if kind == "table" else 1):
        model, encoded = make_any(kind, vocab_size=OUTPUTS, seed=seed), random_frames(len(LENGTHS), 24, OUTPUTS)
        state = tdt_greedy(model, encoded, LENGTHS, DURATIONS, max_symbols)
        for s, length in enumerate(LENGTHS.tolist()):
            wanted, arcs = search_by_definition(model, encoded[s, :length], max_symbols)
            assert state.tokens(s) == wanted
            assert state.tokens(s).confidence == pytest.approx(wanted.confidence, abs=1e-9)
            happened.update(arcs)
        assert state.num_frames.tolist() == LENGTHS.tolist()
    assert kind != "table" or happened >= {"blank of 0", "blank", "full frame", "label", "beyond the end"}
    assert kind != "table" or max_symbols == 1 or "label of 0" in happened


@KINDS
def test_chunks_of_any_lengths_give_what_one_pass_gives(kind: str) -> None:
    model, encoded = make_any(kind, vocab_size=OUTPUTS), random_frames(len(LENGTHS), 24, OUTPUTS)
    whole = tdt_greedy(model, encoded, LENGTHS, DURATIONS, 2)
    passed_over = False
    for seed in range(5):
        # Every sequence is cut at places of its own; some chunks are empty, some shorter than a duration.
        cuts = torch.rand(7, len(LENGTHS), generator=torch.Generator().manual_seed(seed)).sort(dim=0).values
        edges = torch.cat((0 * cuts[:1], cuts, 0 * cuts[:1] + 1)) * LENGTHS
        chunked = search_in_chunks(model, encoded, edges.long().diff(dim=0), 2)
        assert chunked.found == whole.found
        assert torch.equal(chunked.ahead, whole.ahead)
        torch.testing.assert_close(chunked.predicted, whole.predicted, rtol=0, atol=1e-12)
        passed_over |= bool((search_in_chunks(model, encoded, edges.long().diff(dim=0)[:3], 2).ahead > 1).any())
    assert passed_over


def test_a_state_stays_as_it_was_when_the_search_goes_on() -> None:
    model, encoded = TableTransducer(OUTPUTS), random_frames(2, 12, OUTPUTS)
    state = tdt_greedy(model, encoded, torch.tensor([12, 12]), DURATIONS, 2)
    tokens, ahead, predicted = deepcopy(state.tokens(0)), state.ahead.clone(), state.predicted.clone()
    tdt_greedy(model, encoded, torch.tensor([12, 12]), DURATIONS, 2, state)
    assert state.tokens(0) == tokens and len(tokens.ids) > 2
    assert torch.equal(state.ahead, ahead) and torch.equal(state.predicted, predicted)


def test_wrong_settings_and_states_are_refused() -> None:
    model, encoded = TableTransducer(OUTPUTS), random_frames(2, 3, OUTPUTS)
    lengths = torch.tensor([3, 3])
    with pytest.raises(UserError, match=r"decoder\.max_symbols is 0"):
        tdt_greedy(model, encoded, lengths, DURATIONS, 0)
    with pytest.raises(UserError, match=r"transducer\.durations is \[1, 2\]"):
        tdt_greedy(model, encoded, lengths, [1, 2], 1)
    state = tdt_greedy(model, encoded[:1], lengths[:1], DURATIONS, 1)
    with pytest.raises(ValueError, match="state is one of 1 sequences, here are 2"):
        tdt_greedy(model, encoded, lengths, DURATIONS, 1, state)
