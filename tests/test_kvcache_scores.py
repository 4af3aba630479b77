"""Cached scores are the uncached ones: any page size, pool, tier, batch size and dtype, on real rows too."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SAMPLE_MD5
from support.cli import failure_of, invoke, record_of
from support.deferred import DeferredBackend
from support.growing_users import relative
from support.implementations import PLACES, every_device

from hstu_cli.backend import Backend, backend_of
from hstu_cli.bench.requests import RequestSource
from hstu_cli.bench.setup import random_model_for
from hstu_cli.bench.verify import CacheVerifier
from hstu_cli.config import MODEL_PRESETS, ModelConfig
from hstu_cli.data.dataset import PreparedDataset
from hstu_cli.data.kuairand import KuaiRandOptions, prepare_kuairand
from hstu_cli.data.synthetic import SyntheticOptions, prepare_synthetic
from hstu_cli.kvcache import KVCacheConfig, KVCacheManager
from hstu_cli.kvcache.fingerprint import HistoryFingerprint
from hstu_cli.kvcache.manager import kv_bytes_per_token
from hstu_cli.model import RankingModel
from hstu_cli.model.engine import InferenceEngine
from hstu_cli.model.tokens import UserRequest

CONFIG = dataclasses.replace(MODEL_PRESETS["tiny"], max_history=32, max_candidates=12)
MOST_TOKENS = CONFIG.max_history_tokens

everywhere = pytest.mark.parametrize(("impl", "device"), PLACES)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """Users with sessions of 60 to 100 events: histories several windows long, more than max_candidates."""
    root = tmp_path_factory.mktemp("data")
    prepare_synthetic(root, SyntheticOptions(num_users=20, num_events=250, num_items=300, shape="1k"))
    return PreparedDataset(root, "synthetic")


@pytest.fixture(scope="module")
def model(dataset: PreparedDataset) -> RankingModel:
    return random_model_for(dataset, CONFIG, Backend(), seed=0)


def requests_of(dataset: PreparedDataset, config: ModelConfig) -> list[list[UserRequest]]:
    """The timeline in batches of up to 16 distinct users."""
    source = RequestSource(dataset, config)
    return [[source.request(i) for i in batch] for batch in source.batches(16, None)]


def scores(engine: InferenceEngine, batches: list[list[UserRequest]], batch_size: int) -> np.ndarray:
    """Logits and last rows of all requests, flat."""
    found = []
    for batch in batches:
        for start in range(0, len(batch), batch_size):
            result = engine.step(batch[start : start + batch_size])
            found += [result.logits.ravel(), result.last_hidden.float().cpu().numpy().ravel()]
            if engine.cache:
                engine.cache.check_invariants()
    return np.concatenate(found)


Baseline = Callable[[str, str, torch.dtype, int], np.ndarray]


@pytest.fixture(scope="module")
def baseline(dataset: PreparedDataset, model: RankingModel) -> Baseline:
    """Uncached scores; a batch of one gives last rows in another order than one of sixteen."""
    batches = requests_of(dataset, CONFIG)

    @functools.cache
    def uncached(impl: str, device: str, dtype: torch.dtype, batch_size: int) -> np.ndarray:
        return scores(InferenceEngine(placed(model, device, dtype), impl), batches, batch_size)

    return uncached


def placed(model: RankingModel, device: str, dtype: torch.dtype = torch.float32) -> RankingModel:
    return copy.deepcopy(model).to(device, dtype)


def backend_on(device: str) -> Backend:
    """A CPU whose copies happen as late as the protocol allows, or the device itself."""
    return DeferredBackend() if device == "cpu" else backend_of(torch.device(device))


@everywhere
@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("host", [False, True], ids=["device", "host"])
@pytest.mark.parametrize("pool", ["ample", "small"])
@pytest.mark.parametrize("page_size", [1, 16, 32, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cached_scores_are_the_uncached_ones(
    dataset: PreparedDataset,
    model: RankingModel,
    baseline: Baseline,
    impl: str,
    device: str,
    dtype: torch.dtype,
    page_size: int,
    pool: str,
    host: bool,
    batch_size: int,
) -> None:
    pages_of_user = -(-MOST_TOKENS // page_size)
    num_pages = pages_of_user * (20 if pool == "ample" else 2)
    host_bytes = 10 * pages_of_user * page_size * kv_bytes_per_token(CONFIG, dtype) if host else 0
    sizes = KVCacheConfig(num_pages, page_size, host_bytes, verify_host=True)
    cache = KVCacheManager(sizes, CONFIG, dtype, backend_on(device))
    engine = InferenceEngine(placed(model, device, dtype), impl, cache)
    cached = scores(engine, requests_of(dataset, CONFIG), batch_size)
    uncached = baseline(impl, device, dtype, batch_size)
    if dtype == torch.float32:
        assert relative(cached, uncached) < 1e-5
    else:
        exact = baseline(impl, device, torch.float32, batch_size)
        assert relative(cached, exact) <= 2 * relative(uncached, exact)
    counters = cache.counters
    assert counters.device_hit_tokens > 0 or pool == "small"
    assert (counters.evictions > 0) == (pool == "small")
    assert (counters.host_hit_tokens > 0) == (pool == "small" and host)
    assert counters.window_moves > 0 or pool == "small"
    assert counters.corrupt_drops == counters.stale_drops == counters.uncached_requests == 0


@everywhere
def test_one_user_twice_in_a_batch_is_right(
    dataset: PreparedDataset, model: RankingModel, impl: str, device: str
) -> None:
    source, placed_model = RequestSource(dataset, CONFIG), placed(model, device)
    user = source.timeline.user_id[0]
    mine = [source.request(i) for i in range(len(source)) if source.timeline.user_id[i] == user][:3]
    cache = KVCacheManager(KVCacheConfig(100), CONFIG, torch.float32, backend_on(device))
    together = InferenceEngine(placed_model, impl, cache).step([mine[1], mine[0], mine[2]])
    alone = InferenceEngine(placed_model, impl).step([mine[1], mine[0], mine[2]])
    assert relative(together.logits, alone.logits) < 1e-5
    assert together.has_last.tolist() == alone.has_last.tolist()


@everywhere
def test_requests_larger_than_the_pool_run_uncached(
    dataset: PreparedDataset, model: RankingModel, impl: str, device: str
) -> None:
    batches, placed_model = requests_of(dataset, CONFIG), placed(model, device)
    cache = KVCacheManager(KVCacheConfig(num_pages=2, page_size=16), CONFIG, torch.float32, backend_on(device))
    cached = scores(InferenceEngine(placed_model, impl, cache), batches, 16)
    assert relative(cached, scores(InferenceEngine(placed_model, impl), batches, 16)) < 1e-5
    assert cache.counters.uncached_requests > 0


@everywhere
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_weights_that_change_midway_are_noticed(
    dataset: PreparedDataset, model: RankingModel, impl: str, device: str, how: str
) -> None:
    batches = requests_of(dataset, CONFIG)[:12]
    other = placed(random_model_for(dataset, CONFIG, Backend(), seed=1), device).state_dict()
    changing = placed(model, device)
    cache = KVCacheManager(KVCacheConfig(500), CONFIG, torch.float32, backend_on(device))
    engine = InferenceEngine(changing, impl, cache)
    scores(engine, batches[:10], 16)
    changing.load_state_dict(other, assign=how == "replaced")
    fresh = InferenceEngine(changing, impl)
    assert relative(scores(engine, batches[10:], 16), scores(fresh, batches[10:], 16)) < 1e-5
    assert cache.counters.stale_drops > 0


@everywhere
def test_a_step_that_fails_leaves_the_cache_usable(
    dataset: PreparedDataset, model: RankingModel, impl: str, device: str
) -> None:
    batches, placed_model = requests_of(dataset, CONFIG), placed(model, device)
    cache = KVCacheManager(KVCacheConfig(500), CONFIG, torch.float32, backend_on(device))
    engine = InferenceEngine(placed_model, impl, cache)
    engine.step(batches[0])
    users = set(cache.device.users())

    def fail(*arguments: object) -> None:
        raise RuntimeError("the second layer fails")

    handle = placed_model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="second layer"):
        engine.step(batches[1])
    handle.remove()
    cache.check_invariants()
    assert set(cache.device.users()) <= users, "nothing of the step that failed is cached"
    uncached = InferenceEngine(placed_model, impl).step(batches[1]).logits
    assert relative(engine.step(batches[1]).logits, uncached) < 1e-5


def infer(dataset: PreparedDataset, *arguments: object) -> list[object]:
    return ["infer", "--config", "tiny", "--data-root", dataset.path.parent, "--steps", 12, *arguments]


@every_device
def test_infer_verifies_its_cache(dataset: PreparedDataset, device: str) -> None:
    arguments = ["--device", device, "--verify-cache", 3, "--num-pages", 20, "--host-cache-gb", 0.01, "--batch-size", 4]
    for dtype in ("fp32", "bf16"):
        record = record_of(*infer(dataset, *arguments, "--dtype", dtype))
        cache = record["kv_cache"]
        verified = cache["verified"]
        assert cache["enabled"]
        assert verified["num_requests"] == -(-record["num_requests"] // 3)
        assert verified["worst_cached_error"] <= verified["budget"]
        assert cache["host_hit_tokens"] > 0
        assert cache["bytes_onloaded"] > 0
    assert invoke(*infer(dataset, *arguments)).exit_code == 0


def test_infer_fails_where_cached_scores_are_wrong(dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of another history are served: what a broken fingerprint would do."""
    initialize = HistoryFingerprint.__init__

    def blind(self: HistoryFingerprint, identity, context, videos, actions, start) -> None:
        initialize(self, identity, context, videos, actions, start)
        self.matches = lambda tokens: tokens.num_events <= self.num_events

    monkeypatch.setattr(HistoryFingerprint, "__init__", blind)
    result = invoke(*infer(dataset, "--verify-cache", 1, "--format", "json"))
    assert result.exit_code == 1
    assert '"status": "invalid"' in result.stdout
    assert "cached scores differ: request" in result.stderr


def test_the_verifier_keeps_what_is_not_a_number(dataset: PreparedDataset, model: RankingModel) -> None:
    verifier = CacheVerifier(InferenceEngine(model, "blocked"))
    request = requests_of(dataset, CONFIG)[0][0]
    good = verifier.engine.step([request]).logits
    for request_id, logits in ((0, good), (1, np.full_like(good, np.nan)), (2, good)):
        verifier.check(request_id, request, logits)
    assert verifier.worst_request_id == 1
    assert "request 1" in (verifier.failure or "")


def test_infer_without_the_cache_says_so(dataset: PreparedDataset) -> None:
    assert record_of(*infer(dataset, "--no-kv-cache"))["kv_cache"] == {"enabled": False}
    assert "--no-kv-cache" in failure_of(2, *infer(dataset, "--no-kv-cache", "--verify-cache", 1))
    assert "GB" in failure_of(1, *infer(dataset, "--num-pages", 10**9))
    assert "GB" in failure_of(1, *infer(dataset, "--host-cache-gb", 10**6))
    for option in ("--page-size", "--num-pages", "--verify-cache"):
        assert option in failure_of(2, *infer(dataset, option, 0))


def slice_of(dataset: PreparedDataset, root: Path, num_users: int) -> PreparedDataset:
    """The first users of a prepared set as a set of its own."""
    path = root / dataset.name
    path.mkdir(parents=True)
    users = pq.read_table(dataset.path / "sequences.parquet")["user_id"].slice(0, num_users)
    for name in ("sequences.parquet", "requests.parquet"):
        table = pq.read_table(dataset.path / name)
        pq.write_table(table.filter(pc.is_in(table["user_id"], users.combine_chunks())), path / name)
    for name in ("users.parquet", "metadata.json"):
        (path / name).write_bytes((dataset.path / name).read_bytes())
    return PreparedDataset(root, dataset.name)


@pytest.fixture(scope="module")
def sample(sample_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    root = tmp_path_factory.mktemp("sample")
    prepare_kuairand("kuairand-pure", root, KuaiRandOptions(archive=sample_archive, md5=SAMPLE_MD5))
    return PreparedDataset(root, "kuairand-pure")


def predictions(dataset: PreparedDataset, path: Path, *arguments: object) -> np.ndarray:
    options = ["--config", "tiny", "--data-root", dataset.path.parent, "--dtype", "fp32", "--predictions-out", path]
    record_of("infer", *options, *arguments)
    table = pq.read_table(path)
    return np.stack([table[name].to_numpy() for name in table.column_names if name.startswith("logit")])


@every_device
def test_three_hundred_real_users(sample: PreparedDataset, tmp_path: Path, device: str) -> None:
    users = slice_of(sample, tmp_path, 300)
    uncached = predictions(users, tmp_path / "uncached.parquet", "--device", device, "--no-kv-cache")
    for arguments in (["--batch-size", 16], ["--num-pages", 40, "--host-cache-gb", 0.01]):
        cached = predictions(users, tmp_path / "cached.parquet", "--device", device, *arguments)
        assert relative(cached, uncached) < 1e-5


@pytest.mark.slow
@every_device
def test_the_whole_sample(sample: PreparedDataset, tmp_path: Path, device: str) -> None:
    uncached = predictions(sample, tmp_path / "uncached.parquet", "--device", device, "--no-kv-cache")
    assert relative(predictions(sample, tmp_path / "cached.parquet", "--device", device), uncached) < 1e-5
