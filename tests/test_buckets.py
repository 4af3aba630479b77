"""Padding to few shapes: results stay what they are, and the shapes are few."""

from collections import Counter

import numpy as np
import pytest
import torch
from test_attention import oracle

from hstu_cli.backend import Backend
from hstu_cli.config import MODEL_PRESETS
from hstu_cli.kernels import hstu_attention, hstu_paged_attention
from hstu_cli.kernels.attention import bucketed, groups
from hstu_cli.kernels.attention.cases import ATTENTION_CASES, AttentionCase, make_inputs
from hstu_cli.kernels.buckets import bucket, padded, power_of_two
from hstu_cli.kernels.paged_attention.cases import PAGED_CASES, PagedCase, make_paged_inputs
from hstu_cli.kvcache import KVCacheConfig, KVCacheManager
from hstu_cli.model.engine import InferenceEngine
from hstu_cli.model.layer import JaggedAttention
from hstu_cli.model.ranking import RankingModel, random_model
from hstu_cli.model.tokens import UserRequest, build_token_batch

TINY = MODEL_PRESETS["tiny"]
NUM_ITEMS = 50
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def few_shapes(monkeypatch: pytest.MonkeyPatch):
    """A CPU that pads as an NPU does; fresh tensors are NaN, so that an element that is never written shows."""
    monkeypatch.setattr(Backend, "few_shapes", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_buckets_hold_their_sizes_with_a_quarter_to_spare_and_are_few() -> None:
    sizes = [bucket(n) for n in range(65_537)]
    assert sizes[0] == 0
    assert sizes[1:65] == [64] * 64
    assert all(n <= b <= 1.25 * n for n, b in enumerate(sizes) if n > 64)
    assert all(bucket(b) == b for b in sizes)
    assert len(set(sizes[1:])) == 41


def test_powers_of_two_and_padding() -> None:
    assert [power_of_two(n) for n in (0, 1, 2, 3, 4, 5, 1000)] == [1, 1, 2, 4, 4, 8, 1024]
    assert power_of_two(3, 32) == 32
    x = torch.arange(6).view(3, 2)
    assert padded(x, 3) is x
    assert padded(x, 5, 9).tolist() == [[0, 1], [2, 3], [4, 5], [9, 9], [9, 9]]


@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.id)
def test_attention_is_as_exact_as_rounding_allows(case: AttentionCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    out = hstu_attention(
        inputs.q, inputs.k, inputs.v, inputs.seq_offsets, inputs.num_candidates,
        alpha=inputs.alpha, scaling_seqlen=inputs.scaling_seqlen, impl="blocked",
    )  # fmt: skip
    assert (out.shape, out.dtype, out.is_contiguous()) == (inputs.q.shape, dtype, True)
    expected, bound = oracle(inputs)
    assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PAGED_CASES, ids=lambda case: case.id)
def test_cached_rows_equal_those_of_the_whole_sequence(case: PagedCase, dtype: torch.dtype) -> None:
    """Slots behind the cached tokens, and pages that nobody has, are NaN."""
    inputs = make_paged_inputs(case, dtype)
    used = torch.zeros(inputs.pages.shape[0], case.page_size, dtype=torch.bool)
    for start, length in zip(inputs.page_indptr.tolist(), case.cached, strict=False):
        for token in range(length):
            used[inputs.page_ids[start + token // case.page_size], token % case.page_size] = True
    pages = torch.where(used[:, None, :, None, None], inputs.pages, float("nan"))
    new = inputs.new
    out = hstu_paged_attention(
        new.q, new.k, new.v, new.seq_offsets, new.num_candidates,
        pages, inputs.page_indptr, inputs.page_ids, inputs.cached_lengths,
        alpha=new.alpha, scaling_seqlen=new.scaling_seqlen, impl="blocked",
    )  # fmt: skip
    expected, bound = oracle(inputs.whole)
    assert out.shape == new.q.shape
    assert ((out.double() - expected[inputs.new_rows]).abs() <= bound[inputs.new_rows]).all()


@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("block_rows", [3, 32, 100, 128, 512, 600, 1024])
def test_strips_of_any_size_are_as_exact(block_rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of less than a strip, of several, and of candidates alone."""
    monkeypatch.setenv("HSTU_BLOCK_ROWS", str(block_rows))
    monkeypatch.setattr(bucketed, "WITHOUT_CHOICE", 0)  # short sequences are cut, too
    strips = Counter()
    make = groups.Group.forbidden
    monkeypatch.setattr(
        groups.Group, "forbidden", lambda group, start, end: strips.update([end - start]) or make(group, start, end)
    )
    inputs = make_inputs(AttentionCase((0, 700, 1, 40, 150), (0, 30, 1, 40, 0), num_heads=1, head_dim=8), dtype)
    out = hstu_attention(
        inputs.q, inputs.k, inputs.v, inputs.seq_offsets, inputs.num_candidates,
        alpha=inputs.alpha, scaling_seqlen=inputs.scaling_seqlen, impl="blocked",
    )  # fmt: skip
    expected, bound = oracle(inputs)
    assert ((out.double() - expected).abs() <= bound).all()
    assert max(strips) == min(block_rows, 1024)


@pytest.mark.usefixtures("few_shapes")
def test_a_neighbour_that_overflows_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding repeats rows of the batch; what is in them must not matter."""
    monkeypatch.setattr(groups, "GROUP_SCORES", 1 << 30)
    inputs = make_inputs(AttentionCase((5, 20), (1, 2)), torch.float32)
    arguments = {"alpha": inputs.alpha, "scaling_seqlen": inputs.scaling_seqlen, "impl": "blocked"}
    q, k, v = (x.clone() for x in (inputs.q, inputs.k, inputs.v))
    clean = hstu_attention(q, k, v, inputs.seq_offsets, inputs.num_candidates, **arguments)
    for x in (q, k, v):
        x[:6] = torch.inf
    out = hstu_attention(q, k, v, inputs.seq_offsets, inputs.num_candidates, **arguments)
    assert torch.equal(out[6:], clean[6:])


def a_model() -> RankingModel:
    """Tables with keys: of videos with a default row, of users without one; the others without keys."""
    ids = {"video_id": torch.cat([3 * torch.arange(NUM_ITEMS), torch.tensor([-1])]), "user_id": torch.arange(4)}
    sizes = {name: 4 for name in TINY.contextual_features if name != "user_id"}
    return random_model(TINY, ids, sizes, seed=0).double()


def steps(seed: int = 0) -> list[list[UserRequest]]:
    """Batches of growing users: nobody, one with an empty history, more candidates than are scored at once."""
    rng = np.random.default_rng(seed)
    events = 3 * rng.integers(0, NUM_ITEMS + 2, (5, 80))
    context = rng.integers(0, 4, (5, TINY.num_context_tokens))
    lengths = [(0, 1, 7), (2, 70, 7), (5, 71, 40), (5, 80, 79)]
    candidates = [(1, 40, 3), (2, 1, 1), (70, 1, 5), (1, 2, 33)]
    return [
        [
            UserRequest(u, context[u], events[u, :n], events[u, :n] % 256, events[u, : min(c, 80)])
            for u, (n, c) in enumerate(zip(of_lengths, of_candidates, strict=True))
        ]
        for of_lengths, of_candidates in zip(lengths, candidates, strict=True)
    ]


@pytest.mark.parametrize("pages", [None, 400, 12], ids=["uncached", "cached", "evicting"])
def test_scores_are_those_without_padding(monkeypatch: pytest.MonkeyPatch, pages: int | None) -> None:
    model = a_model()
    plain = [InferenceEngine(model, "blocked").step(requests) for requests in steps()]
    monkeypatch.setattr(Backend, "few_shapes", True)
    cache = None
    if pages is not None:
        cache = KVCacheManager(KVCacheConfig(pages, 16), TINY, torch.float64, Backend())
    engine = InferenceEngine(model, "blocked", cache)
    assert engine.few_shapes
    for requests, expected in zip(steps(), plain, strict=True):
        result = engine.step(requests)
        # Products of other sizes may add in another order: roundings of float64, and then one to float32.
        np.testing.assert_allclose(result.logits, expected.logits, rtol=np.finfo(np.float32).eps, atol=1e-10)
        torch.testing.assert_close(result.last_hidden, expected.last_hidden, rtol=1e-10, atol=1e-10)
        assert result.has_last.tolist() == expected.has_last.tolist()
        if cache is not None:
            cache.check_invariants()
    if cache is not None:
        assert cache.counters.device_hit_tokens > 0
        assert (cache.counters.evictions > 0) == (pages == 12)


def test_a_padded_batch_has_its_own_rows_first_and_one_for_padding() -> None:
    for requests in steps():
        batch = build_token_batch(TINY, requests)
        run = batch.in_bucket()
        assert run.num_tokens == bucket(batch.num_tokens + 1) > batch.num_tokens
        assert torch.equal(run.positions[: batch.num_tokens], batch.positions)
        for table, ids in batch.ids.items():
            assert torch.equal(run.ids[table][: len(ids)], ids)
            assert torch.equal(run.slots[table][: len(ids)], batch.slots[table])
            assert (run.slots[table][len(ids) :] == run.num_tokens - 1).all()


@pytest.mark.usefixtures("few_shapes")
def test_layers_share_what_was_planned() -> None:
    """The groups, with their index tensors, are made in the first layer alone."""
    model = a_model()
    batch = build_token_batch(TINY, steps()[2])
    plan = batch.plan()
    with torch.no_grad():
        model(batch, JaggedAttention(TINY, plan, "blocked"))
        made = plan.derived[groups.SEEN][-1]
        model(batch, JaggedAttention(TINY, plan, "blocked"))
    assert plan.derived[groups.SEEN][-1] is made
    assert plan.once(groups.SEEN, list, object()) == []  # of other pages: made anew
    assert sum(len(group.num_new) for group in made) >= 3
