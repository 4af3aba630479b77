"""Graphs by padded shape, on a CPU that pads as an NPU does: which steps replay, and that scores do not change."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graphs import GraphBackend
from support.growing_users import CONFIG, Users, relative, small_model, user_steps

from hstu_cli.backend import Backend
from hstu_cli.kernels import plan_batch, plan_pages
from hstu_cli.kernels.attention import bucketed, groups
from hstu_cli.kernels.attention.groups import PADDED_STEP, GroupedBatch, PaddedSize
from hstu_cli.kvcache import KVCacheConfig, KVCacheManager
from hstu_cli.kvcache.batch import PagedAttention
from hstu_cli.kvcache.manager import kv_bytes_per_token
from hstu_cli.model.buckets import Bucket
from hstu_cli.model.captured import CaptureFailedError
from hstu_cli.model.engine import InferenceEngine
from hstu_cli.model.graphs import GraphRunner, choose_graphs
from hstu_cli.model.ranking import RankingModel
from hstu_cli.model.shaped_graphs import MOST_WASTE, ShapedGraphRunner, StepShape, graph_runner

PAGE_SIZE = 4


@pytest.fixture(scope="module")
def model() -> RankingModel:
    return small_model(seed=0)


@pytest.fixture(scope="module", autouse=True)
def few_shapes():
    """A CPU that pads as an NPU does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backend, "few_shapes", True)
        yield


def make_engine(
    model: RankingModel, *, host_pages: int = 0, num_pages: int = 60, most_tokens: int = 200, **options: int
) -> tuple[InferenceEngine, GraphBackend]:
    """An engine on graphs by shape, and its backend."""
    backend = GraphBackend()
    host_bytes = host_pages * PAGE_SIZE * kv_bytes_per_token(CONFIG, torch.float32)
    cache = KVCacheManager(KVCacheConfig(num_pages, PAGE_SIZE, host_bytes), CONFIG, torch.float32, backend)
    runner = ShapedGraphRunner(model.layers, cache, "blocked", most_tokens, **options)
    return InferenceEngine(model, "blocked", cache, graphs=runner), backend


def shapes_of_steps(engine: InferenceEngine) -> list[tuple[StepShape | None, bool]]:
    """A list that will hold the shape of each step from now on, and whether it replayed."""
    found: list[tuple[StepShape | None, bool]] = []
    runner = engine.graphs
    run = runner.run

    def watched(x: torch.Tensor, attention: PagedAttention) -> torch.Tensor:
        before = runner.replays
        result = run(x, attention)
        found.append((StepShape.of(attention), runner.replays > before))
        return result

    runner.run = watched
    return found


steps = user_steps(8)


@settings(max_examples=30)
@given(steps=steps, host_pages=st.sampled_from([0, 40]), captured_at=st.sampled_from([1, 2]), in_pieces=st.booleans())
def test_steps_of_any_size_score_as_without_graphs(
    model: RankingModel, steps: list[dict[int, tuple[int, int]]], host_pages: int, captured_at: int, in_pieces: bool
) -> None:
    """Random users, new events and candidates; a pool that is too small for all, with and without a host tier.

    in_pieces: sequences run in several groups, each in several strips.
    """
    with pytest.MonkeyPatch.context() as patch:
        if in_pieces:
            patch.setattr(groups, "GROUP_SCORES", 1 << 13)
            patch.setattr(bucketed, "WITHOUT_CHOICE", 0)
            patch.setenv("HSTU_BLOCK_ROWS", "20")
        check_steps(model, steps, host_pages, captured_at)


def check_steps(
    model: RankingModel, steps: list[dict[int, tuple[int, int]]], host_pages: int, captured_at: int
) -> None:
    """Scores are the uncached ones, and every step of a shape that came often enough before is a replay."""
    engine, backend = make_engine(model, host_pages=host_pages, num_pages=30, captured_at=captured_at)
    uncached = InferenceEngine(model, "blocked")
    users = Users(np.random.default_rng(0))
    seen = shapes_of_steps(engine)
    known: set[StepShape] = set()  # when the engine's last step began
    for sizes in steps:
        requests = users.requests(sizes)
        num_before = len(seen)
        found, expected = engine.step(requests), uncached.step(requests)
        assert relative(found.logits, expected.logits) < 1e-5
        assert np.array_equal(found.has_last, expected.has_last)
        if found.has_last.any():
            assert relative(found.last_hidden.numpy(), expected.last_hidden.numpy()) < 1e-5
        engine.cache.check_invariants()
        eager = [shape for shape, replayed in seen[:num_before] if not replayed]
        known |= {shape for shape in eager if shape is not None and eager.count(shape) >= captured_at}
        for shape, replayed in seen[num_before:]:
            assert replayed == (shape in known)
    replays = sum(replayed for _, replayed in seen)
    assert (engine.graphs.replays, engine.graphs.eager_steps) == (replays, len(seen) - replays)
    per_step = CONFIG.num_layers if host_pages else 1
    assert sum(graph.replays for graph in backend.pool.graphs) == per_step * replays
    assert engine.cache.device_storage.pages.isfinite().all()


def attention_over(lengths: list[tuple[int, int]], page_size: int) -> PagedAttention:
    """A planned batch of sequences with so many new and cached tokens."""
    new, cached = zip(*lengths, strict=True)
    pages_each = [-(-n // page_size) for n in cached]
    plan = plan_batch(torch.tensor([0, *new]).cumsum(0), None, sum(new), "cpu")
    page_plan = plan_pages(
        torch.tensor([0, *pages_each]).cumsum(0), torch.arange(sum(pages_each)), torch.tensor(cached),
        num_sequences=len(new), num_pages=max(1, sum(pages_each)), page_size=page_size, device="cpu",
    )  # fmt: skip
    return PagedAttention(CONFIG, None, [], plan, page_plan, torch.empty(0), torch.empty(0), "blocked")


lengths = st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 900)), min_size=1, max_size=12)


@settings(max_examples=60)
@given(lengths=lengths, page_size=st.sampled_from([1, 32, 48]))
def test_a_batch_is_one_size_where_that_computes_at_most_so_much_more(
    lengths: list[tuple[int, int]], page_size: int
) -> None:
    """Scores are counted from the groups themselves, strip by strip; each sequence is in one group and fits there."""
    new = [n for n, _ in lengths]
    attention = attention_over(lengths, page_size)
    shape, separate = StepShape.of(attention), GroupedBatch.of(attention.plan, attention.page_plan)
    if not sum(new):
        assert shape is None
        return
    counted = []
    for batch in (separate, separate.as_one_size()):
        made, scores = batch.on_device(), 0
        found = sorted(
            (int(n), int(c)) for group in made for n, c in zip(group.num_new, group.num_cached, strict=True) if n
        )
        assert found == sorted((n, c) for n, c in lengths if n)
        for group in made:
            assert int(group.num_new.max()) <= group.num_new_padded
            assert int(group.num_cached.max()) <= group.num_cached_padded
            starts = [*range(0, group.num_new_padded, PADDED_STEP), group.num_new_padded]
            rows = [(end - start) * (group.num_cached_padded + end) for start, end in pairwise(starts)]
            scores += len(group.num_new) * sum(rows)
        counted.append(scores)
    assert counted == [separate.num_scores, separate.as_one_size().num_scores]
    width, heads = CONFIG.hidden_dim, CONFIG.num_heads * CONFIG.head_dim
    linear = 2 * sum(new) * width * 4 * heads + 2 * sum(new) * heads * width
    apart, together = (linear + 2 * 2 * heads * scores for scores in counted)
    assert (shape is None) == (together > MOST_WASTE * apart)
    if shape is not None:
        assert shape.num_sequences == sum(len(group.num_new) for group in separate.as_one_size().on_device())


def test_a_shape_that_does_not_come_again_is_not_captured(model: RankingModel) -> None:
    engine, backend = make_engine(model)
    users = Users(np.random.default_rng(1))
    engine.step(users.requests({0: (4, 3)}))
    engine.step(users.requests({0: (1, 3), 1: (2, 1)}))
    assert backend.pool.captured == []
    engine.step(users.requests({0: (1, 2), 1: (1, 1)}))  # the same padded sizes as the step before
    assert backend.pool.captured == [], "no capture while a step is under way"
    engine.graphs.capture_pending()
    assert len(backend.pool.captured) == 1
    assert engine.graphs.capture_ms > 0
    engine.step(users.requests({0: (1, 1), 1: (1, 1)}))
    assert (engine.graphs.replays, engine.graphs.eager_steps) == (1, 3)
    (described,) = engine.graphs.summary()["buckets"]
    assert described == {"batch_size": 2, "num_tokens": 64, "new_tokens_each": 32, "pages_each": 32}


def test_a_replay_writes_to_the_users_own_pages_and_the_spare_one(model: RankingModel) -> None:
    engine, _ = make_engine(model, captured_at=1)
    cache, runner = engine.cache, engine.graphs
    users = Users(np.random.default_rng(2))
    engine.step(users.requests({0: (4, 3), 1: (5, 2)}))
    before = cache.device_storage.pages.clone()
    runner.capture_pending()
    changed = (cache.device_storage.pages != before).flatten(2).any(2).any(0).nonzero().flatten().tolist()
    assert set(changed) <= {cache.config.num_pages}, "capturing writes to the spare page alone"
    before = cache.device_storage.pages.clone()
    runner._x.fill_(torch.nan)  # what an earlier step may have left there
    requests = users.requests({2: (4, 2), 3: (2, 3)})
    assert relative(engine.step(requests).logits, InferenceEngine(model, "blocked").step(requests).logits) < 1e-5
    assert runner.replays == 1
    changed = (cache.device_storage.pages != before).flatten(2).any(2).any(0).nonzero().flatten().tolist()
    written = {page for user in (2, 3) for page in cache.device.get(user).pages}
    assert written <= set(changed) <= written | {cache.config.num_pages}


def test_masks_live_in_graphs_alone(model: RankingModel) -> None:
    """They are made anew from each step's lengths, and no memory is kept for them between replays."""
    engine, _ = make_engine(model, captured_at=1, host_pages=40)
    users = Users(np.random.default_rng(3))
    for sizes in ({0: (9, 3)}, {1: (9, 4)}, {2: (3, 11)}):
        requests = users.requests(sizes)
        assert relative(engine.step(requests).logits, InferenceEngine(model, "blocked").step(requests).logits) < 1e-5
        for buffers in engine.graphs._buffers.values():
            assert all(group.masks == {} for group in buffers.groups)
    assert engine.graphs.replays == 2


def test_weights_that_are_replaced_are_captured_anew(model: RankingModel) -> None:
    changing = copy.deepcopy(model)
    other = small_model(seed=1).state_dict()
    engine, backend = make_engine(changing, captured_at=1)
    users = Users(np.random.default_rng(4))
    engine.step(users.requests({0: (2, 3)}))
    engine.graphs.capture_pending()
    last = changing.layers[-1].output
    for assign in (False, True):  # written in place, as graphs see it; then one in other memory, which they do not know
        captured = len(backend.pool.captured)
        if assign:
            last.weight = torch.nn.Parameter(2.0 * last.weight.detach())
        else:
            changing.load_state_dict(other)
        requests = users.requests({1 + assign: (2, 3)})
        expected = InferenceEngine(changing, "blocked").step(requests).logits
        assert relative(engine.step(requests).logits, expected) < 1e-5
        assert len(backend.pool.captured) - captured == assign
    assert engine.graphs.replays == 2


@pytest.mark.parametrize("host_pages", [0, 40], ids=["one graph", "a graph for each layer"])
def test_a_shape_for_which_memory_does_not_suffice_is_left_out(model: RankingModel, host_pages: int) -> None:
    engine, backend = make_engine(model, host_pages=host_pages, captured_at=1)
    backend.pool.fails_at = {2} if host_pages else {1}
    users = Users(np.random.default_rng(5))
    for sizes in ({0: (2, 3)}, {1: (2, 3)}, {2: (2, 3)}, {0: (1, 30), 1: (1, 30)}, {2: (1, 30), 1: (0, 30)}):
        requests = users.requests(sizes)
        assert relative(engine.step(requests).logits, InferenceEngine(model, "blocked").step(requests).logits) < 1e-5
    summary = engine.graphs.summary()
    assert [len(summary["left_out"]), len(summary["buckets"])] == [1, len(engine.graphs._captured)]
    tried = backend.pool.num_tried
    engine.step(users.requests({3: (2, 3)}))
    assert backend.pool.num_tried == tried, "not tried again"
    assert set(engine.graphs._buffers) == set(engine.graphs._captured), "no buffer of a shape without graphs"
    buffers = sum(each.whole.nbytes for each in engine.graphs._buffers.values()) + engine.graphs._x.nbytes
    assert summary["memory_bytes"] == buffers + 1000 * summary["captured_graphs"]
    assert summary["eager_steps"] >= 3


def test_shapes_beyond_the_bounds_run_without(model: RankingModel) -> None:
    engine, backend = make_engine(model, captured_at=1, most_shapes=1)
    users = Users(np.random.default_rng(6))
    for sizes in ({0: (2, 3)}, {1: (2, 3)}, {0: (1, 30), 1: (1, 30)}, {2: (9, 30), 3: (0, 30)}):
        engine.step(users.requests(sizes))
    summary = engine.graphs.summary()
    assert (len(backend.pool.captured), summary["most_shapes"]) == (1, 1)
    assert summary["steps_beyond"] == summary["eager_steps"] - 1 > 0
    engine, backend = make_engine(model, captured_at=1, most_tokens=20)
    users = Users(np.random.default_rng(6))
    for members in (range(4), range(4, 8)):
        engine.step(users.requests(dict.fromkeys(members, (12, 6))))
    engine.graphs.capture_pending()
    assert backend.pool.captured == []
    assert engine.graphs.eager_steps == 2


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operation not permitted in a capture\nmore"),
        TypeError("capture_begin() got an unexpected keyword"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("replaced", [False, True], ids=["a new shape", "replaced weights"])
def test_a_capture_that_fails_otherwise_is_one_message(model: RankingModel, error: Exception, replaced: bool) -> None:
    """A refusal of the device, and a module of it with other functions."""
    changing = copy.deepcopy(model)
    engine, backend = make_engine(changing, captured_at=1)
    backend.pool.fails_at, backend.pool.error = {1 + replaced}, error
    users = Users(np.random.default_rng(7))
    engine.step(users.requests({0: (2, 3)}))
    if replaced:
        engine.graphs.capture_pending()
        changing.load_state_dict({name: x.clone() for name, x in changing.state_dict().items()}, assign=True)
    said = str(error).partition("\n")[0].replace("()", r"\(\)")
    with pytest.raises(CaptureFailedError, match=f"captures no graph of a step: {said}; run without graphs"):
        engine.step(users.requests({1: (2, 3)}))
    engine.cache.check_invariants()


def test_memory_is_given_back_once_a_round(model: RankingModel) -> None:
    """However many shapes and layers are captured."""
    engine, backend = make_engine(model, captured_at=1, host_pages=40)
    users = Users(np.random.default_rng(8))
    for sizes in ({0: (2, 3)}, {0: (1, 30), 1: (1, 30)}):
        engine.step(users.requests(sizes))
    assert backend.pool.rounds == 1
    engine.graphs.capture_pending()
    engine.graphs.capture_pending()
    assert backend.pool.rounds == 2
    engine.graphs.capture()
    assert (backend.pool.rounds, len(backend.pool.captured)) == (3, 4 * CONFIG.num_layers)


def test_batches_of_like_users_are_one_size_and_others_are_not() -> None:
    alike, unlike = [(40, 130)] * 7 + [(33, 250)], [(1200, 900)] + [(1, 0)] * 11
    assert StepShape.of(attention_over(alike, 32)) == StepShape(313, 8, PaddedSize(64, 8))
    assert StepShape.of(attention_over(unlike, 32)) is None


def test_the_runner_suits_the_device(model: RankingModel, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = GraphBackend()
    cache = KVCacheManager(KVCacheConfig(60, PAGE_SIZE), CONFIG, torch.float32, backend)
    arguments = (model.layers, cache, "blocked", [Bucket(64, 4), Bucket(100, 4)])
    shaped = graph_runner(*arguments)
    assert (type(shaped), len(shaped._x), shaped.captured_at) == (ShapedGraphRunner, 112, 2)
    rehearsed = graph_runner(*arguments, rehearsed_steps=5)
    assert (rehearsed.captured_at, rehearsed.most_shapes) == (1, 5)
    assert choose_graphs(True, backend, "blocked", cached=True).enabled
    assert choose_graphs(None, backend, "blocked", cached=True).enabled
    assert "impl triton reads" in choose_graphs(None, backend, "triton", cached=True).reason
    monkeypatch.setattr(GraphBackend, "why_graphs_only_on_request", "only on request")
    assert choose_graphs(True, backend, "blocked", cached=True).enabled
    assert choose_graphs(None, backend, "blocked", cached=True).reason == "auto: only on request"
    monkeypatch.setattr(Backend, "few_shapes", False)
    assert type(graph_runner(*arguments)) is GraphRunner
