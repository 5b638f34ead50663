"""Tables of docs/recipes.md against the recipes, and their formulas against counts."""

from dataclasses import replace

import pytest
import torch

from benchmarks import recipe_table as table
from benchmarks.recipe_table import Use
from bestrq.pretraining.cost import flops_per_row
from bestrq.pretraining.objective import BestRQ
from bestrq.recognition.transducer import TransducerModel, TransducerSettings
from bestrq.training.flops import count_flops
from common.config import load_yaml
from common.errors import UserError
from common.segments import Segments
from pipelines import memory_formula as formula
from tests.paths import REPOSITORY

NOT_FOR_CLUSTERS = ("quickstart-", "context-effect-", "pretraining-context", "learning-", "fast-115m-long-context-")
CLUSTER = {path.stem for path in (REPOSITORY / "configs").glob("*.yaml") if not path.stem.startswith(NOT_FOR_CLUSTERS)}


def small(name: str) -> table.Recipe:
    """A recipe with a narrow encoder of three blocks."""
    recipe = table.read_recipe(name)
    encoder = replace(
        recipe.encoder, dim=32, num_heads=4, feedforward_dim=48, num_layers=3, subsampling_channels=4, backend="sdpa"
    )
    return replace(recipe, encoder=encoder)


def test_the_page_shows_the_tables_of_the_recipes() -> None:
    """If this fails, copy the tables that `python -m benchmarks.recipe_table` prints into docs/recipes.md."""
    assert table.tables() in (REPOSITORY / "docs/recipes.md").read_text(encoding="utf-8")


def test_every_recipe_for_clusters_is_in_the_tables() -> None:
    """Those of the quickstart and of experiments are described with them."""
    assert {use.recipe for use in table.USES} == CLUSTER


@pytest.mark.parametrize("name", sorted(CLUSTER))
def test_every_number_of_a_recipe_has_a_reason(name: str) -> None:
    """A comment beside it, except in the encoder, whose preset has its source in bestrq/model/presets.py."""
    section, bare = "", []
    for line in (REPOSITORY / f"configs/{name}.yaml").read_text(encoding="utf-8").splitlines()[1:]:
        section = line.partition(":")[0] if not line.startswith((" ", "#")) else section
        key, _, value = line.partition(": ")
        is_number = value.partition(" #")[0].replace(".", "").replace("e-", "").strip().isdigit()
        if is_number and " #" not in line and section not in ("encoder", "checkpoint", "inference"):
            bare.append(key.strip())
    assert set(bare) <= {"log_every"}


def test_flops_of_the_encoder_are_those_of_all_blocks() -> None:
    recipe = small("fast-115m")
    model = BestRQ(recipe.encoder, replace(recipe.quantizer, codebook_size=8))
    counted = flops_per_row(model, 800, 800, torch.device("cpu"))
    heads = 6.0 * (800 // 8 // 3) * 32 * 4 * 8
    assert 3 * table.encoder_flops(recipe.encoder, 800) + heads == pytest.approx(counted, rel=1e-6)


def test_flops_of_the_heads_of_pretraining_are_those_of_its_targets() -> None:
    recipe = small("base-120m")
    codes = recipe.quantizer.num_codebooks * recipe.quantizer.codebook_size
    assert table.head_flops(recipe, 400) == pytest.approx(6 * 100 * 0.3109 * 32 * codes, rel=1e-3)


def test_flops_of_an_unpruned_transducer_are_the_counted_ones() -> None:
    """Forward pass counted with the loss: projections, joint network and prediction network (not in the formula)."""
    recipe = replace(small("base-120m-rnnt"), transducer=TransducerSettings(prediction_dim=16, joint_dim=24))
    frames, vocab_size = 400, recipe.vocab_size
    num_labels = int(frames / table.FRAMES_PER_SECOND * table.LABELS_PER_SECOND)
    model = TransducerModel(recipe.encoder, recipe.transducer, vocab_size).eval()
    segments = Segments(torch.tensor([[0]]), torch.tensor([[frames]]), frames)
    labels = torch.arange(1, num_labels + 1)[None]
    log_mel = torch.zeros(1, frames, 80)
    counted = count_flops(lambda: model(log_mel, segments, labels, torch.tensor([num_labels])).loss_sum)
    forward = counted / 3 - table.encoder_flops(recipe.encoder, frames)
    joint = 2.0 * (frames / 4) * (num_labels + 1) * 24 * vocab_size
    # The formula has 3 forward passes of the projections and 4 of the joint network.
    assert (table.head_flops(recipe, frames) - 4 * joint) / 3 + joint == pytest.approx(forward, rel=0.02)


def test_pruning_reduces_the_flops_of_a_transducer() -> None:
    recipe = small("base-120m-rnnt")
    pruned = replace(recipe, transducer=replace(recipe.transducer, prune_range=5))
    assert table.head_flops(pruned, 1500) < table.head_flops(recipe, 1500) / 3


def test_a_frozen_encoder_costs_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small("base-120m-10min-ctc")
    flops = []
    for frozen in (0, recipe.run.steps):
        changed = replace(recipe, finetune=replace(recipe.finetune, freeze_encoder_steps=frozen))
        monkeypatch.setattr(table, "read_recipe", {"x": changed}.__getitem__)
        flops.append(table.run_flops.__wrapped__("x"))
    head = recipe.run.steps * recipe.seconds * 100 * table.head_flops(recipe, 1500) / 1500
    assert (flops[0] - head) / (flops[1] - head) == pytest.approx(3.0)


def test_memory_of_pretraining_is_that_of_the_formula() -> None:
    recipe = table.read_recipe("base-120m")
    rows = formula.Rows(4, 6000)
    logits = recipe.target_share * 4 * 8192
    expected = formula.weight_bytes(recipe.encoder, 1)
    expected += formula.activation_bytes(recipe.encoder, rows, "none", dense=True, head_logits=logits)
    assert table.memory_bytes(recipe, Use("base-120m", "MLS", 8)) == pytest.approx(expected)


@pytest.mark.parametrize("use", table.USES, ids=lambda use: f"{use.recipe}-{use.gpus}")
def test_a_recipe_fits_its_card_and_divides_its_rows(use: Use) -> None:
    memory = table.memory_bytes(table.read_recipe(use.recipe), use)
    assert memory < 0.9e9 * table.CARDS[use.card].gigabytes


def test_rows_that_the_gpus_cannot_share_are_refused() -> None:
    with pytest.raises(UserError, match="data.rows is 32: give a multiple of 5 GPUs x accumulation 1"):
        table.memory_bytes(table.read_recipe("base-120m"), Use("base-120m", "MLS", 5))


def test_lower_utilisation_takes_more_time_and_one_gpu_transfers_nothing() -> None:
    use = Use("base-120m-10h-ctc", "10 h", 1)
    assert table.network_seconds(table.read_recipe(use.recipe), use) == 0
    assert table.cost_row(use, 0.1)[8] != table.cost_row(use, 0.2)[8]


def test_the_corpora_have_their_published_hours() -> None:
    """Hours of docs/corpora/mls.md."""
    assert table.CORPORA["MLS"] == 44_660 + 1_967 + 1_554 + 1_077 + 918 + 247 + 161 + 104


def test_recipes_hold_only_sections_that_the_table_reads_or_that_cost_nothing() -> None:
    read = {"run", "data", "encoder", "distributed", "quantizer", "masking", "finetune", "transducer"}
    free = {"optimizer", "validation", "checkpoint", "inference", "spec_augment", "hidden_masks"}
    for name in CLUSTER:
        assert set(load_yaml(REPOSITORY / f"configs/{name}.yaml")) <= read | free
