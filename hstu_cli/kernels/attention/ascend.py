"""HSTU attention by the operators of Ascend's RecSDK, where the user has built and installed them.

`torch.ops.mxrec.hstu_jagged` and `hstu_paged`, as RecSDK's README of cust_op/framework/torch_plugin/torch_library/hstu
documents them. They compute `SiLU(q k') * silu_scale * mask` times v; alpha goes into q.
"""

import functools
import math
import sysconfig
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch._ops import OpOverload

from hstu_cli.backend import backend_of, upload
from hstu_cli.kernels.attention.plan import BatchPlan
from hstu_cli.kernels.paged_attention.plan import PagePlan

# Shapes: B sequences, T rows of q, H heads, d head_dim, P page ids.

LIBRARY = "libfbgemm_npu_api.so"
"""What RecSDK installs into site-packages; loading it registers the operators."""

COMMON = {"q", "k", "v", "mask", "attn_bias", "mask_type", "max_seq_len", "silu_scale", "seq_offset", "num_target"}
COMMON |= {"target_group_size"}
ARGUMENTS = {
    "hstu_jagged": COMMON | {"num_context"},
    "hstu_paged": COMMON
    | {"kv_cache", "max_seq_len_k", "seq_offset_k", "seq_offset_t", "page_offsets", "page_ids", "last_page_len"},
}
"""What is passed by name; releases that name it otherwise are refused."""

CAUSAL, CUSTOM = 0, 3
"""Values of mask_type."""

MOST_TOKENS, MOST_CANDIDATES, MOST_HEADS, MOST_HEAD_DIM = 20_480, 512, 16, 512
"""Documented limits; a head dim is a multiple of 16."""

PAGE_SIZES = (32, 64, 128, 256)
"""Tokens of a page that `hstu_paged` takes, by the checks in its source: it reads pages by blocks of 256 tokens."""


def why_unavailable() -> str | None:
    """Why the operators cannot be used in this process, as a clause that says how to get them; None where they can."""
    if _registered() and all(_operator(name) for name in ARGUMENTS):
        return None
    where = Path(sysconfig.get_path("purelib"), LIBRARY)
    how = f"build RecSDK's cust_op for this CANN and torch_npu, which installs {where}"
    if not _registered() and where.exists():
        try:
            torch.ops.load_library(where)
        except OSError as error:
            return f"{where} does not load ({error}); {how}"
    if not _registered():
        return f"torch.ops.mxrec has no {' and '.join(ARGUMENTS)}; {how}"
    other = [name for name in ARGUMENTS if _operator(name) is None]
    return f"this torch.ops.mxrec.{other[0]} has other arguments than are documented; {how}" if other else None


def why_not_page_size(page_size: int) -> str | None:
    """Why pages of so many tokens are none for the paged operator, as a clause; None where they are."""
    if page_size in PAGE_SIZES:
        return None
    sizes = f"{', '.join(map(str, PAGE_SIZES[:-1]))} or {PAGE_SIZES[-1]}"
    return f"impl='ascend' takes pages of {sizes} tokens, not {page_size}"


def _registered() -> bool:
    return all(hasattr(torch.ops.mxrec, name) for name in ARGUMENTS)


@functools.cache
def _operator(name: str) -> OpOverload | None:
    """The overload that takes what is passed to it and needs nothing else; None where there is none.

    `hstu_jagged` has two in RecSDK, `equal` and `delta`. The second is for keys of other lengths than the queries and
    may take all arguments of the first, so a call by the operator's name alone would mean the one registered first.
    """
    packet = getattr(torch.ops.mxrec, name)
    for operator in (getattr(packet, overload) for overload in packet.overloads()):
        arguments = operator._schema.arguments
        names = {argument.name for argument in arguments}
        needed = {argument.name for argument in arguments if not argument.has_default_value()}
        passed = ARGUMENTS[name]
        if needed <= passed <= names and ("seq_offset_k" in names) == ("seq_offset_k" in passed):
            return operator
    return None


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BatchPlan, *, alpha: float, scaling_seqlen: int
) -> torch.Tensor:
    """See `hstu_attention`; ValueError beyond the documented limits."""
    _check(q, plan, plan.max_new_tokens)
    if not plan.max_new_tokens:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    offsets, candidates, no_context = plan.once(
        "ascend", lambda: _upload_lists(plan, [*plan.on_host(), [0] * plan.num_sequences])
    )
    num_rows = plan.on_host()[0][-1]
    return _with_padding(
        _operator("hstu_jagged")(
            q=q[:num_rows] * alpha,
            k=k[:num_rows].contiguous(),
            v=v[:num_rows].contiguous(),
            mask=None,
            attn_bias=None,
            mask_type=CAUSAL,
            max_seq_len=plan.max_new_tokens + 1,  # more than candidates and context, as is asked for
            silu_scale=1.0 / scaling_seqlen,
            seq_offset=offsets,
            num_context=no_context,  # they are causal like the rest
            num_target=candidates,
            target_group_size=1,
        ),
        q,
    )


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BatchPlan,
    pages: torch.Tensor,
    page_plan: PagePlan,
    *,
    alpha: float,
    scaling_seqlen: int,
) -> torch.Tensor:
    """See `hstu_paged_attention`; the operator reads all history from pages, so the new one must be stored.

    Raises ValueError where it is not (`PagePlan.history_stored`), for a page size not in `PAGE_SIZES`, and beyond the
    documented limits.
    """
    if reason := why_not_page_size(page_plan.page_size):
        raise ValueError(reason)
    if not page_plan.history_stored:
        raise ValueError("impl='ascend' reads new history from the pages, and these were planned without it")
    tables = plan.once("ascend paged", lambda: _paged_tables(plan, page_plan, q), page_plan)
    if tables is None:  # nobody has history
        return attention(q, k, v, plan, alpha=alpha, scaling_seqlen=scaling_seqlen)
    _check(q, plan, tables.max_keys)
    num_rows = plan.on_host()[0][-1]
    return _with_padding(
        _operator("hstu_paged")(
            q=q[:num_rows] * alpha,
            k=k[:num_rows].contiguous(),
            v=v[:num_rows].contiguous(),
            kv_cache=pages,
            mask=tables.mask,
            attn_bias=None,
            mask_type=CUSTOM,
            max_seq_len=plan.max_new_tokens,
            max_seq_len_k=tables.max_keys,
            silu_scale=1.0 / scaling_seqlen,
            seq_offset=tables.offsets,
            seq_offset_k=tables.key_offsets,
            seq_offset_t=tables.candidate_offsets,
            page_offsets=tables.page_offsets,
            page_ids=tables.page_ids,
            last_page_len=tables.last_page_lengths,
            num_target=tables.candidates,
            target_group_size=1,
        ),
        q,
    )


@dataclass(frozen=True, slots=True)
class _PagedTables:
    """What the paged operator is told of a batch; int64 on the device.

    offsets, key_offsets, candidate_offsets, page_offsets: [B + 1]; candidates, last_page_lengths: [B]; page_ids [P].
    mask: [B, H, most new tokens, most keys] like q, 1 where a key counts; keys are all history, then the candidates.
    """

    offsets: torch.Tensor
    key_offsets: torch.Tensor
    candidate_offsets: torch.Tensor
    page_offsets: torch.Tensor
    page_ids: torch.Tensor
    candidates: torch.Tensor
    last_page_lengths: torch.Tensor
    mask: torch.Tensor
    max_keys: int


def _paged_tables(plan: BatchPlan, page_plan: PagePlan, q: torch.Tensor) -> _PagedTables | None:
    """The tables of a batch, or None where nobody has history; ValueError where the mask does not fit into memory.

    The operator takes a sequence's history for (pages - 1) * page_size + last_page_len tokens. Who has none gets one
    page, of which it reads no token.
    """
    offsets, candidates = plan.on_host()
    _, cached = page_plan.on_host()
    new = [end - start for start, end in pairwise(offsets)]
    history = [m + n - c for m, n, c in zip(cached, new, candidates, strict=True)]
    if not any(history):
        return None
    page_size = page_plan.page_size
    pages = [max(1, -(-n // page_size)) for n in history]
    tables = [table[:count] if n else [0] for table, count, n in zip(page_plan.all_tables, pages, history, strict=True)]
    ids = [page for table in tables for page in table]
    last = [n - (count - 1) * page_size for n, count in zip(history, pages, strict=True)]
    keys = [n + c for n, c in zip(history, candidates, strict=True)]
    _check_mask((len(new), q.shape[1], max(new), max(keys)), q)
    rows = [[*accumulate(x, initial=0)] for x in (new, keys, candidates, pages)]
    *uploaded, on_candidates, on_last, on_cached, on_history = _upload_lists(
        plan, [*rows, ids, candidates, last, cached, history]
    )
    i = torch.arange(max(new), device=q.device)[:, None] + on_cached[:, None, None]  # place of a new token
    j = torch.arange(max(keys), device=q.device)
    n = on_history[:, None, None]
    allowed = torch.where(i < n, j <= i, (j < n) | (j == i))  # [B, most new, most keys]
    mask = allowed.to(q.dtype)[:, None].expand(-1, q.shape[1], -1, -1).contiguous()
    return _PagedTables(*uploaded, on_candidates, on_last, mask, max(keys))


def _upload_lists(plan: BatchPlan, lists: list[list[int]]) -> list[torch.Tensor]:
    return upload([torch.tensor(x, dtype=torch.int64) for x in lists], plan.seq_offsets.device)


def _with_padding(result: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The result of the rows that sequences have as [T, H, d], zero in those of padding."""
    result = result.view(-1, *q.shape[1:])
    missing = q.shape[0] - result.shape[0]
    return torch.cat([result, q.new_zeros(missing, *q.shape[1:])]) if missing else result


def _check(q: torch.Tensor, plan: BatchPlan, max_keys: int) -> None:
    """ValueError beyond what the operators are documented for."""
    _, num_heads, head_dim = q.shape
    most_candidates = max(plan.on_host()[1], default=0)
    if num_heads > MOST_HEADS or head_dim % 16 or head_dim > MOST_HEAD_DIM:
        raise ValueError(
            f"impl='ascend' takes up to {MOST_HEADS} heads and head dims that are multiples of 16 up to "
            f"{MOST_HEAD_DIM}, not {num_heads} x {head_dim}"
        )
    if max_keys >= MOST_TOKENS or most_candidates > MOST_CANDIDATES:
        raise ValueError(
            f"impl='ascend' takes sequences of less than {MOST_TOKENS:,} tokens and up to {MOST_CANDIDATES} "
            f"candidates, not {max_keys:,} and {most_candidates}"
        )


def _check_mask(shape: tuple[int, ...], q: torch.Tensor) -> None:
    """ValueError where a mask of this shape and q's dtype is more than the device has left."""
    num_bytes, backend = math.prod(shape) * q.dtype.itemsize, backend_of(q.device)
    if num_bytes <= backend.available_memory_bytes:
        return
    backend.release_memory()  # what torch keeps for later counts as taken
    if num_bytes > (available := backend.available_memory_bytes):
        sizes = " x ".join(f"{n:,}" for n in shape)
        raise ValueError(
            f"impl='ascend' needs a mask of {sizes} {q.dtype}, {num_bytes / 1e9:,.1f} GB, "
            f"and {q.device} has {available / 1e9:,.1f} GB left; take smaller batches, or impl='blocked'"
        )
