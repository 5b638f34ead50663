"""Prediction networks: whole sequences equal label by label, states that a search can reorder, and no dropout in it."""

import pytest
import torch
from torch import Tensor

from bestrq.recognition.prediction import LSTMPrediction, StatelessPrediction

VOCAB, DIM = 7, 5
SEQUENCES = [[3, 3, 6, 1], [], [2], [5, 4, 3, 2, 1, 6, 6]]
KINDS = [("stateless", 1), ("stateless", 2), ("stateless", 3), ("lstm", 1), ("lstm", 2)]
Prediction = StatelessPrediction | LSTMPrediction


def make(kind: str, size: int, dropout: float = 0.0) -> Prediction:
    torch.manual_seed(0)
    if kind == "lstm":
        return LSTMPrediction(VOCAB, DIM, size, dropout).double()
    return StatelessPrediction(VOCAB, DIM, size, dropout).double()


def label_by_label(network: Prediction, sequence: list[int]) -> Tensor:
    state, outputs = network.start(1), []
    for label in [0, *sequence]:
        output, state = network.step(torch.tensor([label]), state)
        outputs.append(output)
    return torch.cat(outputs)


@pytest.mark.parametrize(("kind", "size"), KINDS)
def test_whole_sequences_give_the_outputs_and_gradients_of_label_by_label(kind: str, size: int) -> None:
    network = make(kind, size)
    got = network([torch.tensor(one, dtype=torch.int64) for one in SEQUENCES])
    wanted = torch.cat([label_by_label(network, one) for one in SEQUENCES])
    assert got.shape == (sum(len(one) + 1 for one in SEQUENCES), DIM)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    parameters = list(network.parameters())
    weight = torch.randn_like(got)
    for one, other in zip(
        *(torch.autograd.grad((weight * outputs).sum(), parameters) for outputs in (got, wanted)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "size"), KINDS)
def test_states_can_be_picked_repeated_and_reordered(kind: str, size: int) -> None:
    network = make(kind, size)
    state = network.start(3)
    assert all(len(tensor) == 3 for tensor in state)
    for labels in ([0, 0, 0], [1, 2, 3], [4, 5, 6]):
        _, state = network.step(torch.tensor(labels), state)
    order = [2, 0, 0, 1]
    output, _ = network.step(torch.tensor([3, 1, 2, 6]), tuple(tensor[order] for tensor in state))
    for row, (source, label) in enumerate(zip(order, [3, 1, 2, 6], strict=True)):
        wanted = label_by_label(network, [[1, 4], [2, 5], [3, 6]][source] + [label])[-1]
        torch.testing.assert_close(output[row], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "size"), KINDS)
def test_a_step_leaves_the_state_before_it_as_it_was(kind: str, size: int) -> None:
    network = make(kind, size)
    _, state = network.step(torch.tensor([0, 0]), network.start(2))
    before = [tensor.clone() for tensor in state]
    network.step(torch.tensor([4, 5]), state)
    assert all(torch.equal(one, other) for one, other in zip(state, before, strict=True))


@pytest.mark.parametrize("context", [1, 2, 3])
def test_a_stateless_network_sees_its_last_labels_and_no_more(context: int) -> None:
    network = make("stateless", context)
    one, other = ([1] * (6 - context) + [2, 3, 4][:context], [5] * (6 - context) + [2, 3, 4][:context])
    outputs = [network([torch.tensor(labels)])[-1] for labels in (one, other)]
    assert torch.equal(*outputs)
    other[-context] = 6
    assert not torch.equal(outputs[0], network([torch.tensor(other)])[-1])


def test_an_lstm_sees_all_labels_and_no_later_one() -> None:
    network = make("lstm", 1)
    outputs = [network([torch.tensor(labels)]) for labels in ([1, 2, 3, 4], [6, 2, 3, 4], [1, 2, 3, 5])]
    assert not torch.isclose(outputs[0][1:], outputs[1][1:], rtol=0, atol=1e-9).all(dim=-1).any()
    assert torch.equal(outputs[0][:4], outputs[2][:4])


@pytest.mark.parametrize("kind", ["stateless", "lstm"])
def test_dropout_is_of_training_alone(kind: str) -> None:
    network = make(kind, 1, dropout=0.5)
    labels = [torch.tensor([1, 2, 3, 4, 5, 6])]
    assert not torch.equal(network(labels), network(labels))
    network.eval()
    assert torch.equal(network(labels), network(labels))
    torch.testing.assert_close(network(labels), label_by_label(network, labels[0].tolist()), rtol=0, atol=1e-12)


def test_an_lstm_is_computed_in_the_precision_of_its_weights_under_autocast() -> None:
    network = make("lstm", 2).float()
    labels = [torch.tensor([1, 2, 3, 4, 5, 6])]
    wanted, wanted_step = network(labels), network.step(torch.tensor([3]), network.start(1))[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(labels), wanted)
        assert torch.equal(network.step(torch.tensor([3]), network.start(1))[0], wanted_step)
