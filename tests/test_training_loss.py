"""The losses of training against their formulas, and the gradients that are written by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from hstu_cli.config import CONTEXTUAL_FEATURES, MODEL_PRESETS, TASKS
from hstu_cli.model.ranking import RankingModel, random_model
from hstu_cli.training import loss
from hstu_cli.training.loss import NextItemChoice, next_item_loss, ranking_loss, task_targets
from hstu_cli.training.setup import ActionBits

CONFIG = MODEL_PRESETS["tiny"]
NUM_ITEMS = 50


@pytest.fixture
def model() -> RankingModel:
    ids = {"video_id": torch.cat([torch.tensor([-1]), torch.arange(NUM_ITEMS) * 3])}
    return random_model(CONFIG, ids, dict.fromkeys(CONTEXTUAL_FEATURES, 2), seed=0).double()


def rows_and_targets(model: RankingModel, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(count, CONFIG.hidden_dim, dtype=torch.float64, generator=generator)
    targets = torch.randint(1, NUM_ITEMS + 1, (count,), generator=generator)
    return rows.requires_grad_(), targets


def test_bits_of_labels() -> None:
    targets = task_targets(torch.tensor([0, 65, 255]))
    assert targets[0].sum() == 0
    assert [TASKS[t] for t in targets[1].nonzero()[:, 0]] == ["is_click", "long_view"]
    assert targets[2].sum() == 8


def test_ranking_loss_is_the_sum_over_its_tasks_alone() -> None:
    logits, targets = torch.randn(5, 8), torch.rand(5, 8).round()
    probability = torch.sigmoid(logits.double())
    expected = -(targets * probability.log() + (1 - targets) * (1 - probability).log())[:, [0, 6]].sum()
    found = ranking_loss(logits, targets, torch.tensor([0, 6]))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7 * NUM_ITEMS, 1 << 20], ids=["a row", "seven rows", "all rows"])
def test_next_item_loss_is_cross_entropy_over_the_vocabulary(
    model: RankingModel, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setitem(loss.CHUNK_SCORES, True, chunk)
    rows, targets = rows_and_targets(model, 23)
    weight = model.embeddings["video_id"].weight
    found = next_item_loss(model, rows, targets, NextItemChoice.draw(model, None, torch.Generator()))
    gradients = torch.autograd.grad(3 * found, [rows, weight])
    scores = model.next_item_scores(rows.detach())  # columns are the rows but the default one
    expected = F.cross_entropy(scores, targets - 1, reduction="sum")
    torch.testing.assert_close(found.detach(), expected, rtol=1e-10, atol=1e-10)
    cosine = F.normalize(rows, dim=1) @ F.normalize(weight[1:], dim=1).T / CONFIG.next_item_temperature
    plain = torch.autograd.grad(3 * F.cross_entropy(cosine, targets - 1, reduction="sum"), [rows, weight])
    for own, other in zip(gradients, plain, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-10)
    assert gradients[1][0].abs().max() == 0  # the default row is no item


def test_a_sample_estimates_the_partition_function_without_bias(model: RankingModel) -> None:
    rows, targets = rows_and_targets(model, 1)
    generator = torch.Generator().manual_seed(2)
    scores = model.next_item_scores(rows.detach())[0]
    own = scores[targets[0] - 1]
    whole = scores.exp().sum()
    estimates = []
    for _ in range(4000):
        found = next_item_loss(model, rows, targets, NextItemChoice.draw(model, 20, generator)).detach()
        estimates.append((found + own).exp())
    spread = torch.stack(estimates).std() / math.sqrt(len(estimates))
    assert abs(torch.stack(estimates).mean() - whole) < 4 * spread


@pytest.mark.parametrize("sampled", [False, True], ids=["all items", "a sample"])
def test_the_partition_function_passes_gradcheck(monkeypatch: pytest.MonkeyPatch, sampled: bool) -> None:
    monkeypatch.setitem(loss.CHUNK_SCORES, True, 3 * 11)
    shapes = ((8, 4), (11, 4), (8,))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    sample = (torch.randint(5, (8,)), torch.randint(5, (11,)), 0.3) if sampled else (None, None, 0.0)
    assert torch.autograd.gradcheck(lambda *x: 2 * loss._LogPartition.apply(*x, *sample), inputs)


def test_a_sample_as_large_as_the_vocabulary_is_the_vocabulary(model: RankingModel) -> None:
    assert NextItemChoice.draw(model, NUM_ITEMS, torch.Generator()).sampled_from is None
    assert NextItemChoice.draw(model, None, torch.Generator()).sampled_from is None
    drawn = NextItemChoice.draw(model, NUM_ITEMS - 1, torch.Generator())
    assert drawn.sampled_from == NUM_ITEMS
    assert len(drawn.items) == NUM_ITEMS - 1
    assert 0 not in drawn.items  # the default row


def test_the_vectors_of_action_bits_get_the_gradient_of_their_sums(model: RankingModel) -> None:
    table = model.embeddings["action_weights"]
    bits = ActionBits(table, torch.Generator().manual_seed(0))
    ids = torch.tensor([0, 65, 65, 3, 255])
    weights = torch.randn(len(ids), CONFIG.hidden_dim, dtype=torch.float64)
    (table(ids) * weights).sum().backward()
    bits.take_gradient()
    assert table.weight.grad is None
    vectors = bits.vectors.detach().clone().requires_grad_()
    columns = [[1.0, *(float(i >> t & 1) for t in range(8))] for i in ids.tolist()]
    (torch.tensor(columns, dtype=torch.float64) @ vectors * weights).sum().backward()
    torch.testing.assert_close(bits.vectors.grad, vectors.grad)
    with torch.no_grad():
        bits.vectors.add_(1)
    bits.write()
    torch.testing.assert_close(table.weight[3], bits.vectors[0] + bits.vectors[1] + bits.vectors[2])
