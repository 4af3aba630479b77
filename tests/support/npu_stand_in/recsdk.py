"""Operators with the documented arguments and limits of RecSDK's hstu_jagged and hstu_paged, as plain loops."""

import torch
import torch.nn.functional as F

MASK = "Tensor? mask=None, Tensor? attn_bias=None, int mask_type=0, int max_seq_len=0"
OF_USERS = "Tensor? num_context=None, Tensor? num_target=None, int? target_group_size=0, float? alpha=1.0"
EQUAL = (
    f"hstu_jagged.equal(Tensor q, Tensor k, Tensor v, {MASK}, float silu_scale=0.0, "
    f"Tensor seq_offset=None, {OF_USERS}) -> Tensor"
)
DELTA = (
    f"hstu_jagged.delta(Tensor q, Tensor k, Tensor v, {MASK}, int max_seq_len_k=0, float silu_scale=0.0, "
    f"Tensor seq_offset=None, Tensor seq_offset_k=None, {OF_USERS}) -> Tensor"
)
PAGED = (
    f"hstu_paged(Tensor q, Tensor k, Tensor v, Tensor kv_cache=None, {MASK}, int max_seq_len_k=0, "
    "float silu_scale=0.0, Tensor seq_offset=None, Tensor seq_offset_k=None, Tensor seq_offset_t=None, "
    "Tensor page_offsets=None, Tensor page_ids=None, Tensor last_page_len=None, Tensor num_target=None, "
    "int target_group_size=0, float? alpha=1.0, bool deterministic=False) -> Tensor"
)

_LIBRARY = torch.library.Library("mxrec", "FRAGMENT")


def register(*, delta_first: bool = False) -> None:
    """Make `torch.ops.mxrec` what RecSDK's library makes it; its two `hstu_jagged` in either order."""
    jagged = [(EQUAL, hstu_jagged), (DELTA, hstu_jagged_delta)]
    for schema, function in (*(reversed(jagged) if delta_first else jagged), (PAGED, hstu_paged)):
        _LIBRARY.define(schema)
        _LIBRARY.impl(schema.partition("(")[0], function, "PrivateUse1")


def hstu_jagged_delta(q, k, v, **_) -> None:
    """For keys of other lengths than the queries: nobody here has such."""
    raise AssertionError("hstu_jagged.delta was called")


def hstu_jagged(
    q, k, v, mask=None, attn_bias=None, mask_type=0, max_seq_len=0, silu_scale=0.0,
    seq_offset=None, num_context=None, num_target=None, target_group_size=0, alpha=1.0,
):  # fmt: skip
    """Causal; the last `num_target` of a sequence see what is before them, and themselves."""
    _check(q, max_seq_len, num_target)
    assert mask is None
    assert mask_type == 0
    assert alpha == 1.0
    assert seq_offset.dtype == torch.int64
    assert (num_context.tolist(), target_group_size) == ([0] * len(num_target), 1)
    ends = seq_offset.tolist()
    assert ends[-1] == len(q)
    outputs = []
    for start, end, targets in zip(ends, ends[1:], num_target.tolist(), strict=False):
        assert targets < max_seq_len >= end - start
        i = torch.arange(end - start, device=q.device)[:, None]
        j = i.T
        seen = ((j <= i) & (j < end - start - targets)) | (j == i)
        outputs.append(_attend(q[start:end], k[start:end], v[start:end], seen.to(q.dtype), silu_scale))
    return torch.cat(outputs).flatten(1)


def hstu_paged(
    q, k, v, kv_cache=None, mask=None, attn_bias=None, mask_type=0, max_seq_len=0, max_seq_len_k=0, silu_scale=0.0,
    seq_offset=None, seq_offset_k=None, seq_offset_t=None, page_offsets=None, page_ids=None, last_page_len=None,
    num_target=None, target_group_size=0, alpha=1.0, deterministic=False,
):  # fmt: skip
    """Keys are all history, from the pages, and then the new tokens' last `num_target`; a mask says which count."""
    _check(q, max_seq_len, num_target)
    assert (mask_type, target_group_size, alpha) == (3, 1, 1.0)
    assert mask.shape == (len(num_target), q.shape[1], max_seq_len, max_seq_len_k)
    assert mask.dtype == q.dtype
    assert len(page_ids)
    page_size = kv_cache.shape[2]
    assert page_size in (32, 64, 128, 256), "its source divides a block of 256 tokens by it"
    starts, key_starts, target_starts = seq_offset.tolist(), seq_offset_k.tolist(), seq_offset_t.tolist()
    page_starts, last, targets = page_offsets.tolist(), last_page_len.tolist(), num_target.tolist()
    assert starts[-1] == len(q)
    outputs = []
    for b, count in enumerate(targets):
        assert target_starts[b + 1] - target_starts[b] == count
        pages = kv_cache.index_select(0, page_ids[page_starts[b] : page_starts[b + 1]])
        num_history = (page_starts[b + 1] - page_starts[b] - 1) * page_size + last[b]
        assert 0 <= num_history <= len(pages) * page_size, "history comes from whole pages and a part of the last"
        history = pages.transpose(0, 1).flatten(1, 2)[:, :num_history]
        end = starts[b + 1]
        keys = torch.cat([history[0], k[end - count : end]])
        values = torch.cat([history[1], v[end - count : end]])
        assert len(keys) == key_starts[b + 1] - key_starts[b]
        counted = mask[b, 0, : end - starts[b], : len(keys)]
        outputs.append(_attend(q[starts[b] : end], keys, values, counted, silu_scale))
    return torch.cat(outputs)


def _check(q, max_seq_len, num_target) -> None:
    """The documented limits."""
    assert 1 <= max_seq_len <= 20_480
    assert q.shape[1] <= 16
    assert q.shape[2] % 16 == 0
    assert max(num_target.tolist()) <= 512


def _attend(q, k, v, mask, silu_scale):
    """`(SiLU(q k') * silu_scale * mask) v` of one sequence, [T, H, d]."""
    scores = torch.einsum("ihd,jhd->hij", q, k)
    return torch.einsum("hij,jhd->ihd", F.silu(scores) * silu_scale * mask, v)
