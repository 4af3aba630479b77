"""What a run needs before it starts: a model for the data at hand, and a cache of the right size."""

from dataclasses import dataclass

import torch

from hstu_cli.backend import Backend
from hstu_cli.bench.requests import RequestSource
from hstu_cli.config import ModelConfig
from hstu_cli.data.dataset import PreparedDataset
from hstu_cli.errors import RunError
from hstu_cli.kvcache import KVCacheConfig, KVCacheManager
from hstu_cli.kvcache.manager import kv_bytes_per_token
from hstu_cli.model.ranking import RankingModel, random_model
from hstu_cli.model.tokens import VIDEO_TABLE


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """The sizes of a cache; None takes what the requests need and memory allows.

    verify_host: keep checksums of what is in host memory. append_impl: what writes new keys and values into pages;
    impl: what its auto follows.
    """

    page_size: int = 32
    num_pages: int | None = None
    host_bytes: int | None = None
    verify_host: bool = False
    append_impl: str = "auto"
    impl: str = "auto"


def build_cache(
    source: RequestSource, config: ModelConfig, dtype: torch.dtype, backend: Backend, options: CacheOptions
) -> KVCacheManager:
    """A cache for these requests.

    Host memory is used where copies to it are no copies within it: not on a CPU, unless asked for.
    Raises RunError where the cache would take more memory than there is.
    """
    page_bytes = options.page_size * kv_bytes_per_token(config, dtype)
    needed = sum(-(-tokens // options.page_size) for tokens in source.history_tokens_by_user(config))
    num_pages = options.num_pages
    if num_pages is None:
        num_pages = max(1, min(needed, int(backend.cache_memory_share * backend.available_memory_bytes) // page_bytes))
    host_bytes = options.host_bytes
    if host_bytes is None:
        spill = max(0, needed - num_pages) * page_bytes
        host_bytes = 0 if backend.type == "cpu" else min(spill, Backend().memory_bytes // 4)
    host_memory = Backend().memory_bytes
    for what, size, memory in (
        (f"{num_pages:,} pages of {page_bytes:,} bytes", num_pages * page_bytes, backend.memory_bytes),
        ("its part in host memory", host_bytes + (num_pages * page_bytes if backend.type == "cpu" else 0), host_memory),
    ):
        if size > memory:
            raise RunError(f"The KV cache does not fit: {what}: {size / 1e9:,.1f} GB, of {memory / 1e9:,.1f} GB here.")
    sizes = KVCacheConfig(
        num_pages, options.page_size, host_bytes, options.verify_host, options.append_impl, options.impl
    )
    return KVCacheManager(sizes, config, dtype, backend)


def random_model_for(dataset: PreparedDataset, config: ModelConfig, backend: Backend, seed: int) -> RankingModel:
    """Seeded random weights with a row for every id of the data set.

    Raises RunError where the tables alone would not fit into the device's memory.
    """
    ids = {VIDEO_TABLE: dataset.video_ids(), "user_id": dataset.users(["user_id"])[:, 0]}
    sizes = {name: 1 + len(values) for name, values in dataset.metadata["category_maps"].items()}
    table_bytes = 4 * config.hidden_dim * sum(map(len, ids.values()))
    if table_bytes > 0.8 * min(backend.memory_bytes, Backend().memory_bytes):
        raise RunError(
            f"Random embedding tables for {dataset.name} would take {table_bytes / 1e9:.0f} GB. "
            "Choose a narrower --config such as tiny, or pass a --checkpoint."
        )
    return random_model(config, {name: torch.from_numpy(keys) for name, keys in ids.items()}, sizes, seed=seed)


def unknown_context_ids(model: RankingModel, dataset: PreparedDataset) -> dict[str, int]:
    """Users whose id of a contextual feature is no row of the model's table, by feature; a new user_id is none."""
    features = [name for name in model.config.contextual_features if name != "user_id"]
    counts = {}
    for name, ids in zip(features, dataset.users(features).T if features else (), strict=True):
        table = model.embeddings[name]
        if table.keys is not None:
            counts[name] = int((~table.is_known(torch.from_numpy(ids.copy()))).sum())
    return {name: count for name, count in counts.items() if count}
