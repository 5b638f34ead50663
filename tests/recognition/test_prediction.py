"""Prediction networks: complete sequences against single steps, reordered states, dropout, autocast."""

import pytest
import torch
from torch import Tensor

from bestrq.recognition.prediction import LSTMPrediction, StatelessPrediction
from tests.lattices import assert_same

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
def test_whole_sequences_have_the_outputs_and_gradients_of_single_steps(kind: str, size: int) -> None:
    network = make(kind, size)
    result = network([torch.tensor(sequence, dtype=torch.int64) for sequence in SEQUENCES])
    expected = torch.cat([label_by_label(network, sequence) for sequence in SEQUENCES])
    assert result.shape == (sum(len(sequence) + 1 for sequence in SEQUENCES), DIM)
    parameters = list(network.parameters())
    weight = torch.randn_like(result)
    grads = (torch.autograd.grad((weight * outputs).sum(), parameters) for outputs in (result, expected))
    assert_same([result], [expected], 1e-12)
    assert_same(*grads, 1e-12)


@pytest.mark.parametrize(("kind", "size"), KINDS)
def test_states_can_be_selected_repeated_and_reordered(kind: str, size: int) -> None:
    network = make(kind, size)
    state = network.start(3)
    assert all(len(tensor) == 3 for tensor in state)
    for labels in ([0, 0, 0], [1, 2, 3], [4, 5, 6]):
        _, state = network.step(torch.tensor(labels), state)
    order = [2, 0, 0, 1]
    output, _ = network.step(torch.tensor([3, 1, 2, 6]), tuple(tensor[order] for tensor in state))
    for row, (source, label) in enumerate(zip(order, [3, 1, 2, 6], strict=True)):
        expected = label_by_label(network, [[1, 4], [2, 5], [3, 6]][source] + [label])[-1]
        torch.testing.assert_close(output[row], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "size"), KINDS)
def test_a_step_does_not_modify_its_input_state(kind: str, size: int) -> None:
    network = make(kind, size)
    _, state = network.step(torch.tensor([0, 0]), network.start(2))
    before = [tensor.clone() for tensor in state]
    network.step(torch.tensor([4, 5]), state)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(state, before, strict=True))


@pytest.mark.parametrize("context", [1, 2, 3])
def test_a_stateless_network_depends_on_its_last_labels_only(context: int) -> None:
    network = make("stateless", context)
    sequences = [[label] * (6 - context) + [2, 3, 4][:context] for label in (1, 5)]
    outputs = [network([torch.tensor(labels)])[-1] for labels in sequences]
    assert torch.equal(*outputs)
    sequences[1][-context] = 6
    assert not torch.equal(outputs[0], network([torch.tensor(sequences[1])])[-1])


def test_an_lstm_depends_on_all_earlier_labels_and_no_later_one() -> None:
    network = make("lstm", 1)
    outputs = [network([torch.tensor(labels)]) for labels in ([1, 2, 3, 4], [6, 2, 3, 4], [1, 2, 3, 5])]
    assert not torch.isclose(outputs[0][1:], outputs[1][1:], rtol=0, atol=1e-9).all(dim=-1).any()
    assert torch.equal(outputs[0][:4], outputs[2][:4])


@pytest.mark.parametrize("kind", ["stateless", "lstm"])
def test_dropout_is_active_in_training_mode_only(kind: str) -> None:
    network = make(kind, 1, dropout=0.5)
    labels = [torch.tensor([1, 2, 3, 4, 5, 6])]
    assert not torch.equal(network(labels), network(labels))
    network.eval()
    assert torch.equal(network(labels), network(labels))
    torch.testing.assert_close(network(labels), label_by_label(network, labels[0].tolist()), rtol=0, atol=1e-12)


def test_an_lstm_is_computed_in_the_precision_of_its_weights_under_autocast() -> None:
    network = make("lstm", 2).float()
    labels = [torch.tensor([1, 2, 3, 4, 5, 6])]
    expected, expected_step = network(labels), network.step(torch.tensor([3]), network.start(1))[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(labels), expected)
        assert torch.equal(network.step(torch.tensor([3]), network.start(1))[0], expected_step)
