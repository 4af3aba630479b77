"""Graphs: which bucket a step takes, that padding changes no score, and what happens where memory is short."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graphs import GraphBackend, HostGraphRunner
from support.growing_users import CONFIG, Users, relative, small_model, user_steps

from hstu_cli.backend import Backend
from hstu_cli.config import MODEL_PRESETS, ModelConfig
from hstu_cli.errors import UnavailableError, UsageError
from hstu_cli.kvcache import KVCacheConfig, KVCacheManager
from hstu_cli.kvcache.manager import kv_bytes_per_token
from hstu_cli.model.buckets import Bucket, default_buckets, smallest_that_holds
from hstu_cli.model.captured import CaptureFailedError
from hstu_cli.model.engine import InferenceEngine
from hstu_cli.model.graphs import GraphChoice, GraphRunner, choose_graphs
from hstu_cli.model.ranking import RankingModel

pytestmark = pytest.mark.usefixtures("poisoned_memory")  # rows of padding too

BUCKETS = (Bucket(7, 4), Bucket(24, 2), Bucket(60, 4))


@pytest.fixture(scope="module")
def model() -> RankingModel:
    return small_model(seed=0)


def make_engine(
    model: RankingModel, *, host_pages: int = 0, num_pages: int = 60, buckets: tuple[Bucket, ...] = BUCKETS
) -> tuple[InferenceEngine, GraphBackend]:
    """An engine on graphs that are captured already, and its backend."""
    backend = GraphBackend()
    page_size = 4
    host_bytes = host_pages * page_size * kv_bytes_per_token(CONFIG, torch.float32)
    cache = KVCacheManager(KVCacheConfig(num_pages, page_size, host_bytes), CONFIG, torch.float32, backend)
    runner = HostGraphRunner(model.layers, cache, "blocked", buckets)
    runner.capture()
    return InferenceEngine(model, "blocked", cache, graphs=runner), backend


steps = user_steps(6)


@settings(max_examples=40)
@given(steps=steps, host_pages=st.sampled_from([0, 40]))
def test_steps_of_any_size_score_as_without_graphs(
    model: RankingModel, steps: list[dict[int, tuple[int, int]]], host_pages: int
) -> None:
    """Random users, new events and candidates; a pool that is too small for all, with and without a host tier."""
    engine, backend = make_engine(model, host_pages=host_pages, num_pages=30)
    uncached = InferenceEngine(model, "blocked")
    users = Users(np.random.default_rng(0))
    runs = []
    size_for = engine.graphs.size_for

    def recorded(attention):
        bucket = size_for(attention)
        plan = attention.plan
        runs.append((plan.num_tokens, plan.num_sequences, bucket))
        return bucket

    engine.graphs.size_for = recorded
    for sizes in steps:
        requests = users.requests(sizes)
        found, expected = engine.step(requests), uncached.step(requests)
        assert relative(found.logits, expected.logits) < 1e-5
        assert np.array_equal(found.has_last, expected.has_last)
        if found.has_last.any():
            assert relative(found.last_hidden.numpy(), expected.last_hidden.numpy()) < 1e-5
        engine.cache.check_invariants()
    for num_tokens, num_sequences, bucket in runs:
        fitting = [b for b in BUCKETS if num_tokens <= b.num_tokens and num_sequences <= b.batch_size]
        assert bucket == (fitting[0] if fitting else None)
    in_graphs = sum(bucket is not None for _, _, bucket in runs)
    assert (engine.graphs.replays, engine.graphs.eager_steps) == (in_graphs, len(runs) - in_graphs)
    per_step = CONFIG.num_layers if host_pages else 1
    assert sum(graph.replays for graph in backend.pool.graphs) == per_step * in_graphs


def test_a_replay_is_the_same_work_bit_for_bit(model: RankingModel) -> None:
    """A step that fills its bucket exactly needs no padding: the very same operations run."""
    requests = Users(np.random.default_rng(1)).requests({0: (3, 5), 1: (2, 5)})  # 1 + 6 + 5 and 1 + 4 + 5 tokens
    engine, _ = make_engine(model, buckets=(Bucket(22, 2),))
    eager = InferenceEngine(model, "blocked", KVCacheManager(KVCacheConfig(60, 4), CONFIG, torch.float32, Backend()))
    found, expected = engine.step(requests), eager.step(requests)
    assert engine.graphs.replays == 1
    assert np.array_equal(found.logits, expected.logits)
    assert torch.equal(found.last_hidden, expected.last_hidden)


def test_padding_reaches_no_page_of_a_user_and_no_score(model: RankingModel) -> None:
    engine, _ = make_engine(model)
    cache, runner = engine.cache, engine.graphs
    users = Users(np.random.default_rng(2))
    engine.step(users.requests({0: (4, 3), 1: (5, 2)}))
    before = cache.device_storage.pages.clone()
    runner._x.fill_(torch.nan)  # what an earlier step may have left behind the tokens of this one
    requests = users.requests({2: (3, 2)})
    inputs: list[torch.Tensor] = []
    handle = model.layers[0].register_forward_pre_hook(lambda layer, arguments: inputs.append(arguments[0].clone()))
    found = engine.step(requests).logits
    handle.remove()
    assert relative(found, InferenceEngine(model, "blocked").step(requests).logits) < 1e-5
    assert len(inputs[0]) == 24
    assert not inputs[0][1 + 2 * 3 + 2 :].any(), "rows of padding are zero, and so stay finite"
    spare = cache.config.num_pages
    written = {2: cache.device.get(2).pages}
    changed = (cache.device_storage.pages != before).flatten(2).any(2).any(0).nonzero().flatten().tolist()
    assert set(changed) <= {*written[2], spare}
    assert set(written[2]) <= set(changed)
    assert cache.device_storage.pages.isfinite().all()


def test_graphs_of_layers_wait_for_the_pages_of_their_layer_alone(model: RankingModel) -> None:
    """While layer 0 of a returning user computes, the copies of layer 1 have not happened yet."""
    engine, backend = make_engine(model, host_pages=40, num_pages=12)
    users = Users(np.random.default_rng(3))
    engine.step(users.requests({0: (16, 2)}))
    engine.step(users.requests({1: (16, 2)}))  # evicts user 0 to the host
    pending: list[int] = []
    for graphs in engine.graphs._captured.values():
        for graph in graphs:
            graph.work = lambda work=graph.work: (pending.append(backend.num_pending), work())
    requests = users.requests({0: (0, 2)})
    expected = InferenceEngine(model, "blocked").step(requests).logits
    assert relative(engine.step(requests).logits, expected) < 1e-5
    assert engine.cache.counters.host_hit_tokens > 0
    assert len(pending) == CONFIG.num_layers
    assert pending[0] > pending[1] == 0


def test_weights_that_are_replaced_are_captured_anew(model: RankingModel) -> None:
    changing = copy.deepcopy(model)
    other = small_model(seed=1).state_dict()
    engine, backend = make_engine(changing)
    users = Users(np.random.default_rng(4))
    engine.step(users.requests({0: (2, 3)}))
    for assign in (False, True):  # written in place, as graphs see it; then other memory, which they do not know
        captured = len(backend.pool.captured)
        changing.load_state_dict(other, assign=assign)
        requests = users.requests({0: (1, 3)})
        expected = InferenceEngine(changing, "blocked").step(requests).logits
        assert relative(engine.step(requests).logits, expected) < 1e-5
        assert len(backend.pool.captured) - captured == (len(BUCKETS) if assign else 0)


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # in rows of padding, which hold anything
@pytest.mark.parametrize("host_pages", [0, 30], ids=["one graph", "a graph for each layer"])
def test_kernels_that_read_sizes_on_the_device_score_padded_steps(model: RankingModel, host_pages: int) -> None:
    """Triton's kernels in the interpreter, from what is in the buffers at replay: nothing is known on the host."""
    page_size = 16
    host_bytes = host_pages * page_size * kv_bytes_per_token(CONFIG, torch.float32)
    sizes = KVCacheConfig(4, page_size, host_bytes, append_impl="triton")
    cache = KVCacheManager(sizes, CONFIG, torch.float32, GraphBackend())
    runner = GraphRunner(model.layers, cache, "triton", (Bucket(12, 3), Bucket(32, 2)))
    runner.capture()
    engine, uncached = InferenceEngine(model, "triton", cache, graphs=runner), InferenceEngine(model, "blocked")
    users = Users(np.random.default_rng(7))
    for sizes in ({0: (3, 2), 1: (2, 1)}, {2: (14, 3)}, {0: (2, 7), 3: (5, 2)}, {1: (0, 1), 2: (1, 1)}):
        requests = users.requests(sizes)
        assert relative(engine.step(requests).logits, uncached.step(requests).logits) < 1e-5
        cache.check_invariants()
    assert runner.replays == 5  # one of the steps has more candidates than the model takes at once
    assert cache.counters.evictions > 0
    assert (cache.counters.host_hit_tokens > 0) == (host_pages > 0)
    assert cache.device_storage.pages.isfinite().all()


@pytest.mark.parametrize("failing", [{1}, {2}, {1, 2, 3}], ids=str)
@pytest.mark.parametrize("host_pages", [0, 40], ids=["one graph", "a graph for each layer"])
def test_buckets_for_which_memory_does_not_suffice_are_left_out(
    model: RankingModel, failing: set[int], host_pages: int
) -> None:
    """Captures go from the largest on; a layer's failure gives up its bucket alone."""
    backend = GraphBackend()
    backend.pool.fails_at = set(failing)
    host_bytes = host_pages * 4 * kv_bytes_per_token(CONFIG, torch.float32)
    cache = KVCacheManager(KVCacheConfig(60, 4, host_bytes), CONFIG, torch.float32, backend)
    runner = HostGraphRunner(model.layers, cache, "blocked", BUCKETS)
    runner.capture()
    tried = list(reversed(BUCKETS))
    if not host_pages:
        lost = [tried[i - 1] for i in sorted(failing)]
    else:  # a bucket is two captures, and ends at the first that fails
        lost = {1: tried[:1], 2: tried[:1], 3: tried}[max(failing)]
    assert runner.left_out == lost
    summary = runner.summary()
    assert len(summary["buckets"]) == len(BUCKETS) - len(lost)
    assert len(summary["left_out"]) == len(lost)
    buffers = sum(tensor.nbytes for tensor in (runner._x, runner._int32, runner._int64))
    assert summary["memory_bytes"] == buffers + 1000 * summary["captured_graphs"], "nothing of what was dropped"
    engine = InferenceEngine(model, "blocked", cache, graphs=runner)
    requests = Users(np.random.default_rng(5)).requests({0: (2, 1), 1: (0, 1)})
    expected = InferenceEngine(model, "blocked").step(requests).logits
    assert relative(engine.step(requests).logits, expected) < 1e-5
    assert (runner.replays, runner.eager_steps) == ((0, 1) if len(lost) == len(BUCKETS) else (1, 0))


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: out of memory"),
        UnavailableError("an H200 has not the resources for any configuration: M=64 N=64: CUDA out of memory."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_may_run_out_anywhere(model: RankingModel, error: Exception) -> None:
    """In the driver, and where a kernel is tuned; nothing is left to replay, and steps run as ever."""
    backend = GraphBackend()
    backend.pool.fails_at, backend.pool.error = set(range(1, 9)), error
    cache = KVCacheManager(KVCacheConfig(60, 4), CONFIG, torch.float32, backend)
    runner = HostGraphRunner(model.layers, cache, "blocked", (*BUCKETS, Bucket(3, 4)))  # fewer tokens than sequences
    runner.capture()
    assert len(runner.left_out) == 4
    backend.pool.fails_at = set()
    runner.capture()
    assert runner.left_out == []


def test_other_errors_of_a_capture_are_one_message(model: RankingModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCacheManager(KVCacheConfig(60, 4), CONFIG, torch.float32, GraphBackend())
    runner = HostGraphRunner(model.layers, cache, "blocked", BUCKETS)

    def broken(*arguments: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(type(model.layers[0]), "forward", broken)
    with pytest.raises(CaptureFailedError, match=r"captures no graph of a step: operation not permitted when stream"):
        runner.capture()


def test_embeddings_that_the_graphs_cannot_read_are_refused(model: RankingModel) -> None:
    engine, _ = make_engine(model)
    for x in (torch.zeros(3, 7), torch.zeros(3, CONFIG.hidden_dim, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"x must be \[tokens, 64\] torch.float32 on cpu"):
            engine.graphs.run(x, None)


def test_the_record_tells_what_was_captured(model: RankingModel) -> None:
    engine, _ = make_engine(model, host_pages=40)
    engine.step(Users(np.random.default_rng(6)).requests({0: (1, 1)}))
    summary = engine.graphs.summary()
    assert summary["buckets"] == [{"batch_size": b.batch_size, "num_tokens": b.num_tokens} for b in BUCKETS]
    assert summary["captured_graphs"] == len(BUCKETS) * CONFIG.num_layers
    assert summary["layerwise"]
    x_bytes = 4 * CONFIG.hidden_dim * 60
    graphs_bytes = 1000 * len(BUCKETS) * CONFIG.num_layers
    assert 0 < summary["memory_bytes"] - graphs_bytes - x_bytes < 16 * (60 + 64) + 4 * 200
    assert (summary["replays"], summary["eager_steps"], summary["left_out"]) == (1, 0, [])


@pytest.mark.parametrize("config", MODEL_PRESETS.values(), ids=MODEL_PRESETS)
@pytest.mark.parametrize("batch_size", [1, 3, 32, 1000])
def test_default_buckets_are_few_and_close(config: ModelConfig, batch_size: int) -> None:
    buckets = default_buckets(config, batch_size)
    sizes = [bucket.num_tokens for bucket in buckets]
    assert len(buckets) <= 12
    assert sizes == sorted(set(sizes))
    assert {bucket.batch_size for bucket in buckets} == {batch_size}
    largest_step = batch_size * (config.max_history_tokens + config.max_candidates)
    assert sizes[-1] == min(8192, largest_step)
    for size, larger in itertools.pairwise(sizes):
        assert larger <= (2 if size < 512 else 1.5) * size


def test_the_smallest_bucket_has_the_least_work() -> None:
    buckets = [Bucket(64, 1), Bucket(32, 4), Bucket(32, 8), Bucket(128, 8)]
    assert smallest_that_holds(buckets, 30, 3) == Bucket(32, 4)
    assert smallest_that_holds(buckets, 32, 5) == Bucket(32, 8)
    assert smallest_that_holds(buckets, 33, 1) == Bucket(64, 1)
    assert smallest_that_holds(buckets, 33, 2) == Bucket(128, 8)
    assert smallest_that_holds(buckets, 129, 1) is smallest_that_holds(buckets, 1, 9) is None
    with pytest.raises(ValueError, match="num_tokens must be at least 1"):
        Bucket(0, 1)


def test_graphs_are_used_where_they_can_be_and_refused_where_they_are_asked_for_in_vain() -> None:
    cpu, gpu = Backend(), GraphBackend()
    assert choose_graphs(None, gpu, "triton", cached=True) == GraphChoice(True, "auto: impl triton can be captured")
    assert choose_graphs(True, gpu, "triton", cached=True) == GraphChoice(True, "as requested")
    assert choose_graphs(False, gpu, "triton", cached=True) == GraphChoice(False, "as requested")
    assert choose_graphs(None, cpu, "triton", cached=True) == GraphChoice(False, "auto: a CPU has no graphs to replay")
    assert not choose_graphs(None, gpu, "blocked", cached=True).enabled
    assert not choose_graphs(None, gpu, "triton", cached=False).enabled
    with pytest.raises(UnavailableError, match="a CPU has no graphs to replay"):
        choose_graphs(True, cpu, "triton", cached=True)
    for impl, cached, reason in (("blocked", True, "reads a batch's sizes on the host"), ("triton", False, "no KV")):
        with pytest.raises(UsageError, match=reason):
            choose_graphs(True, gpu, impl, cached=cached)


def test_a_runner_knows_the_sizes_on_the_device_alone(model: RankingModel) -> None:
    cache = KVCacheManager(KVCacheConfig(60, 4), CONFIG, torch.float32, GraphBackend())
    attention = GraphRunner(model.layers, cache, "triton", BUCKETS).static_attention(Bucket(24, 2))
    assert attention.plan.offsets is attention.plan.candidates is None
    assert attention.page_plan.tables is attention.page_plan.lengths is None
    assert (attention.plan.num_tokens, attention.plan.num_sequences, attention.plan.max_new_tokens) == (24, 2, 24)
    assert attention.page_plan.max_cached_tokens == CONFIG.max_history_tokens
    assert len(attention.new_rows) == len(attention.new_slots) == 24
    pointers = (attention.plan.seq_offsets, attention.page_plan.page_ids, attention.new_slots)
    assert all(tensor.data_ptr() % 64 == pointers[0].data_ptr() % 64 for tensor in pointers[:2])
