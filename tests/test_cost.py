"""FLOPs, bytes and weights from the shapes, against torch's counter, the mask and the published limits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hstu_cli.bench.e2e import GrowingUsers
from hstu_cli.config import MODEL_PRESETS
from hstu_cli.kernels import hstu_attention, plan_batch
from hstu_cli.kernels.attention.reference import attention_mask
from hstu_cli.model.cost import (
    SequenceShape,
    activation_bytes,
    attention_flops,
    block_bytes,
    block_flops,
    block_parameters,
    linear_flops,
)
from hstu_cli.model.layer import HSTUBlock, JaggedAttention

TINY, BENCHMARK = MODEL_PRESETS["tiny"], MODEL_PRESETS["benchmark"]


@given(history=st.integers(0, 40), share=st.floats(0, 1), candidates=st.integers(0, 20))
def test_pairs_are_those_of_the_mask(history: int, share: float, candidates: int) -> None:
    shape = SequenceShape(history, int(share * history), candidates)
    mask = attention_mask(history + candidates, candidates, torch.device("cpu"))
    assert shape.num_pairs == int(mask[shape.num_cached :].sum())
    assert shape.num_new == len(mask) - shape.num_cached


def test_linear_flops_are_those_that_torch_counts() -> None:
    """Beside those of the smallest squares of attention."""
    block, pairs = HSTUBlock(TINY), 19
    tokens = 2 * pairs
    plan = plan_batch(2 * torch.arange(pairs + 1), None, tokens, "cpu")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block(torch.randn(tokens, TINY.hidden_dim), JaggedAttention(TINY, plan, "reference"))
    of_layer = linear_flops(TINY, tokens) + attention_flops(TINY, pairs * 2**2)
    assert counter.get_total_flops() == TINY.num_layers * of_layer


def test_attention_flops_are_those_that_torch_counts() -> None:
    """The reference computes the dense square: as many pairs as that has."""
    tokens = 29
    q, k, v = torch.randn(3, tokens, TINY.num_heads, TINY.head_dim)
    with FlopCounterMode(display=False) as counter:
        hstu_attention(
            q, k, v, torch.tensor([0, tokens]), torch.tensor([4]), alpha=1.0, scaling_seqlen=9, impl="reference"
        )
    assert counter.get_total_flops() == attention_flops(TINY, tokens**2)


def test_the_whole_block_is_its_linear_layers_and_its_attention() -> None:
    """The reference computes dense squares; with the pairs of the mask in their place it is our count."""
    lengths, candidates = [6, 9], [2, 3]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        HSTUBlock(TINY)(
            torch.randn(sum(lengths), TINY.hidden_dim),
            JaggedAttention(TINY, plan_batch(offsets, torch.tensor(candidates), sum(lengths), "cpu"), "reference"),
        )
    shapes = [SequenceShape(n - c, 0, c) for n, c in zip(lengths, candidates, strict=True)]
    unseen = sum(n * n for n in lengths) - sum(shape.num_pairs for shape in shapes)
    assert counter.get_total_flops() == block_flops(TINY, shapes) + TINY.num_layers * attention_flops(TINY, unseen)


def test_limits_are_the_published_ones() -> None:
    def limit(candidates: int) -> float:
        whole, part = (block_flops(BENCHMARK, [SequenceShape(4096, m, candidates)]) for m in (0, 3968))
        return whole / part

    assert limit(256) == pytest.approx(8.08, abs=0.005)
    assert limit(0) == pytest.approx(22.4, abs=0.05)
    workload = GrowingUsers(1, 256, 16, 256)
    whole, part = (workload.cost(BENCHMARK, 2, cached=cached)[0] for cached in (False, True))
    assert whole / part == pytest.approx(4.12, abs=0.005)


def test_weights_are_counted() -> None:
    assert block_parameters(TINY) == sum(p.numel() for p in HSTUBlock(TINY).parameters())


def test_bytes_are_weights_ends_and_the_cache() -> None:
    shape = SequenceShape(num_history=100, num_cached=60, num_candidates=5)
    ends = 2 * 45 * TINY.hidden_dim  # 45 new rows in, as many out
    kv = TINY.num_layers * 2 * TINY.attention_dim
    assert block_bytes(TINY, [shape], 2, stored=True) == 2 * (block_parameters(TINY) + ends + kv * (60 + 40))
    assert block_bytes(TINY, [shape], 4, stored=False) == 4 * (block_parameters(TINY) + ends + kv * 60)
    both = block_bytes(TINY, [shape, shape], 2, stored=True)
    assert both == 2 * (block_parameters(TINY) + 2 * ends + 2 * kv * 100)


def test_a_dense_composition_needs_more_memory() -> None:
    shapes = [SequenceShape(4096, 0, 256)]
    dense, strips = (activation_bytes(BENCHMARK, shapes, 2, dense=d) for d in (True, False))
    assert dense > 3 * 2 * BENCHMARK.num_heads * 4352**2
    assert strips < dense / 2
