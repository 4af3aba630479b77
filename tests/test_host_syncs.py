"""What a step asks of the device besides its logits: nothing that this thread would have to wait for."""

import collections
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hstu_cli.backend import Backend
from hstu_cli.config import MODEL_PRESETS
from hstu_cli.kvcache import KVCacheConfig, KVCacheManager
from hstu_cli.model.engine import InferenceEngine
from hstu_cli.model.layer import JaggedAttention
from hstu_cli.model.ranking import RankingModel, random_model
from hstu_cli.model.tokens import UserRequest, build_token_batch

TINY = MODEL_PRESETS["tiny"]
NUM_ITEMS = 40

SYNCHRONIZING = {
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.masked_select",
    "aten.repeat_interleave",
    "aten.unique_consecutive",
    "aten._unique2",
    "aten.equal",
}
"""Operations whose result, or its size, this thread needs: on a device it waits for all queued work."""


class Synchronizations(TorchDispatchMode):
    """Counts them: indexing with a mask is one, as it asks how many are set."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        masks = [
            index
            for index in (args[1] if name in ("aten.index", "aten.index_put", "aten.index_put_") else ())
            if index is not None and index.dtype in (torch.bool, torch.uint8)
        ]
        if name in SYNCHRONIZING or masks:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def a_model(default_row: bool = True) -> RankingModel:
    """A model whose tables are looked up by key, with a row for unknown ids or without one."""
    keys = torch.arange(NUM_ITEMS) * 3
    ids = {"video_id": torch.cat([keys, torch.tensor([-1])]) if default_row else keys, "user_id": torch.arange(5)}
    sizes = {name: 4 for name in TINY.contextual_features if name != "user_id"}
    return random_model(TINY, ids, sizes, seed=0)


def requests(num_events: int) -> list[UserRequest]:
    context = np.zeros(TINY.num_context_tokens, np.int64)
    events = np.arange(num_events) % NUM_ITEMS
    return [UserRequest(user, context, 3 * events, events % 4, 3 * np.arange(4)) for user in range(3)]


def test_the_counter_sees_what_waits() -> None:
    x = torch.arange(5.0)
    waits = [lambda: x[x > 1], lambda: float(x[0]), lambda: bool(x.any()), lambda: x.tolist(), lambda: x.nonzero()]
    for wait in waits:
        with Synchronizations() as counted:
            wait()
        assert counted.found or wait is waits[3]  # a list of a CPU's tensor reads memory without an operator
    with Synchronizations() as counted:
        torch.where(x > 1, x, 0)[torch.tensor([1, 2])].sum()
    assert not counted.found


@pytest.mark.parametrize("default_row", [True, False], ids=["default row", "zero vector"])
def test_the_model_waits_for_nothing(default_row: bool) -> None:
    model = a_model(default_row)
    batch = build_token_batch(TINY, requests(9))
    attention = JaggedAttention(TINY, batch.plan(), "blocked")
    with torch.no_grad(), Synchronizations() as counted:
        hidden = model(batch, attention)
        model.rank(hidden)
        model.next_item_rank(hidden[:3], torch.tensor([0, 3, 7]))
    assert not counted.found


def test_attention_over_pages_waits_for_nothing() -> None:
    model = a_model()
    cache = KVCacheManager(KVCacheConfig(50), TINY, torch.float32, Backend())
    engine = InferenceEngine(model, "blocked", cache)
    engine.step(requests(5))
    counted = Synchronizations()
    handles = [
        model.layers.register_forward_pre_hook(lambda *_: counted.__enter__() and None),
        model.layers.register_forward_hook(lambda *_: counted.__exit__(None, None, None)),
    ]
    engine.step(requests(9))
    for handle in handles:
        handle.remove()
    assert cache.counters.device_hit_tokens > 0
    assert not counted.found


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_a_step_on_a_gpu_waits_once(graphs: bool) -> None:
    """For its logits; torch itself warns of each time."""
    from hstu_cli.backend import CudaBackend
    from hstu_cli.kernels.dispatch import choose_impl
    from hstu_cli.model.buckets import default_buckets
    from hstu_cli.model.graphs import GraphRunner

    backend = CudaBackend()
    model = a_model().to(backend.device, torch.bfloat16)
    impl = choose_impl("auto", "cuda").name
    cache = KVCacheManager(KVCacheConfig(200), TINY, torch.bfloat16, backend)
    runner = None
    if graphs:
        runner = GraphRunner(model.layers, cache, impl, default_buckets(TINY, 3))
        runner.capture()
    engine = InferenceEngine(model, impl, cache, graphs=runner)
    for num_events in (3, 9):  # loads and tunes what the second one needs
        engine.step(requests(num_events))
    cache.clear()
    engine.step(requests(3))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing CUDA operation") as found:
            engine.step(requests(9))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in found if "synchronizing CUDA operation" in str(w.message)]) == 1
