"""What the KV cache costs and what it saves: its books alone, one growing user, a replay of a data set.

Books: a million users with a page each in a pool of a million pages; the time of storing, growing,
evicting and dropping, per page, beside a pool a hundred times smaller (constant time shows as equal).

Growing user: `kuairand_gr` in bf16, one user whose history grows to 4,096 events in steps of 64, with
100 candidates each time, cached and uncached requests in turn. The FLOP ratio of the two, from the
shapes alone, limits the speed-up. The cache's own share is the time in `split`, `prepare` and
`complete`, fingerprints included, of the cached requests' time.

Replay: `hstu infer` on a prepared data set with and without the cache, in turn.
"""

import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from hstu_cli.backend import Backend
from hstu_cli.bench.e2e import NUM_ITEMS, benchmark_model
from hstu_cli.config import CONTEXTUAL_FEATURES, MODEL_PRESETS, ModelConfig
from hstu_cli.kvcache import KVCacheConfig, KVCacheManager
from hstu_cli.kvcache.tier import CachedTokens, Tier
from hstu_cli.model.cost import SequenceShape, block_flops
from hstu_cli.model.engine import InferenceEngine
from hstu_cli.model.ranking import RankingModel
from hstu_cli.model.tokens import UserRequest
from hstu_cli.report import environment, key_value_table

CANDIDATES = 100
STEP_EVENTS = 64


def measure_books(num_users: int, operations: int = 200_000) -> dict[str, float]:
    """Microseconds per page of each operation on a full tier of `num_users` users with one page each."""
    tier = Tier(num_users)
    tokens = CachedTokens(num_tokens=1, num_events=0, window_start=0, digest=b"")

    def store(user: int) -> None:
        reservation = tier.prepare({user: 1})
        tier.take_pages(reservation)
        tier.complete(reservation, {user: tokens})

    def timed(function: Any, users: list[int]) -> float:
        start = time.perf_counter()
        for user in users:
            function(user)
        return (time.perf_counter() - start) / len(users) * 1e6

    operations = min(operations, num_users)
    shuffled = random.Random(0).sample(range(num_users), operations)
    return {
        "store_us": timed(store, list(range(num_users))),
        "store_again_us": timed(store, shuffled),
        "store_and_evict_us": timed(store, list(range(num_users, num_users + operations))),
        "drop_us": timed(tier.drop, list(range(num_users, num_users + operations))),
    }


class BookkeepingTimer:
    """Adds up the time that a cache manager spends on anything but the model's own work."""

    def __init__(self, engine: InferenceEngine) -> None:
        self.seconds = 0.0
        for owner, name in (
            (engine.cache, "split"),
            (engine.cache, "prepare"),
            (engine.cache, "complete"),
            (engine.weights, "current"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return run


def growing_requests(config: ModelConfig) -> list[UserRequest]:
    """One user's requests, with 64 events more each time up to the window."""
    rng = np.random.default_rng(0)
    videos = rng.integers(0, NUM_ITEMS, config.max_history)
    actions = rng.integers(0, 256, config.max_history)
    context = np.zeros(len(CONTEXTUAL_FEATURES), np.int64)
    return [
        UserRequest(0, context, videos[:n], actions[:n], rng.integers(0, NUM_ITEMS, CANDIDATES))
        for n in range(STEP_EVENTS, config.max_history + 1, STEP_EVENTS)
    ]


def measure_growing_user(model: RankingModel, repeats: int) -> dict[str, Any]:
    """Cached and uncached requests of one growing user, in turn; sums over the medians of each request."""
    config = model.config
    requests = growing_requests(config)
    uncached_engine = InferenceEngine(model)
    times: dict[str, list[list[float]]] = {"cached": [], "uncached": []}
    shares = []
    uncached_engine.step(requests[:1])
    for _ in range(repeats):
        pages = -(-config.max_history_tokens // 32)
        cache = KVCacheManager(KVCacheConfig(pages), config, model.dtype, Backend())
        engine = InferenceEngine(model, cache=cache)
        books = BookkeepingTimer(engine)
        rounds: dict[str, list[float]] = {"cached": [], "uncached": []}
        for request in requests:
            for name, runner in (("cached", engine), ("uncached", uncached_engine)):
                start = time.perf_counter()
                runner.step([request])
                rounds[name].append(time.perf_counter() - start)
        for name, samples in rounds.items():
            times[name].append(samples)
        shares.append(books.seconds / sum(rounds["cached"]))
    medians = {name: np.median(np.array(samples), axis=0) for name, samples in times.items()}
    history = [config.num_context_tokens + 2 * len(request.video_ids) for request in requests]
    known = [0, *history[:-1]]
    flops = {
        name: block_flops(config, [SequenceShape(n, m, CANDIDATES) for n, m in zip(history, cached, strict=True)])
        for name, cached in (("cached", known), ("uncached", [0] * len(history)))
    }
    speedup = float(medians["uncached"].sum() / medians["cached"].sum())
    limit = flops["uncached"] / flops["cached"]
    return {
        "num_requests": len(requests),
        "repeats": repeats,
        "cached_ms": [float(t) * 1e3 for t in medians["cached"]],
        "uncached_ms": [float(t) * 1e3 for t in medians["uncached"]],
        "uncached_gflops_per_s": flops["uncached"] / float(medians["uncached"].sum()) / 1e9,
        "cached_gflops_per_s": flops["cached"] / float(medians["cached"].sum()) / 1e9,
        "speedup": speedup,
        "speedup_limit": limit,
        "share_of_limit": speedup / limit,
        "bookkeeping_share": statistics.median(shares),
    }


def measure_replay(data_root: Path, dataset: str, arguments: list[str], repeats: int) -> dict[str, Any]:
    """Throughput of `hstu infer` with and without the cache, in turn."""
    throughput: dict[str, list[float]] = {"--kv-cache": [], "--no-kv-cache": []}
    for _ in range(repeats):
        for option, samples in throughput.items():
            command = [sys.executable, "-m", "hstu_cli", "infer", "--data-root", str(data_root), "--dataset", dataset]
            command += [*arguments, option, "--format", "json"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            samples.append(json.loads(done.stdout)["throughput_rps"])
    pairs = zip(throughput["--kv-cache"], throughput["--no-kv-cache"], strict=True)
    return {
        "arguments": arguments,
        "cached_rps": throughput["--kv-cache"],
        "uncached_rps": throughput["--no-kv-cache"],
        "speedup": statistics.median(cached / uncached for cached, uncached in pairs),
    }


def main(
    output: Annotated[Path, typer.Option(help="Write the JSON record here.")],
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of each comparison.")] = 3,
    data_root: Annotated[Path | None, typer.Option(help="Also replay a data set that is prepared here.")] = None,
    dataset: Annotated[str, typer.Option(help="Its name.")] = "kuairand-pure",
    steps: Annotated[int, typer.Option(min=1, help="Batches of the replay.")] = 1000,
) -> None:
    """Measure the KV cache on this machine's CPU."""
    Backend().tune_process()
    config = MODEL_PRESETS["kuairand_gr"]
    model = benchmark_model(config, seed=0).to(torch.bfloat16)
    record: dict[str, Any] = {
        "env": environment(Backend().device_name, Backend().memory_bytes),
        "books": {str(n): measure_books(n) for n in (10_000, 1_000_000)},
        "growing_user": measure_growing_user(model, repeats),
    }
    if data_root is not None:
        period = ["--from", "2022-04-25", "--steps", str(steps)]
        record["replay"] = {
            name: measure_replay(data_root, dataset, ["--config", name, *period], repeats)
            for name in ("tiny", "kuairand_gr")
        }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    console = Console()
    for users, books in record["books"].items():
        console.print(key_value_table(f"Books of {int(users):,} users, microseconds", books))
    growing = {key: value for key, value in record["growing_user"].items() if not isinstance(value, list)}
    console.print(key_value_table("One growing user", growing))
    for name, replay in record.get("replay", {}).items():
        console.print(key_value_table(f"Replay with {name}", {"speed-up by the cache": replay["speedup"]}))


if __name__ == "__main__":
    typer.run(main)
