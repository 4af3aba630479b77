"""Paged attention and appending to pages, against attention over whole sequences in float64."""

import pytest
import torch
from support.implementations import IMPLEMENTATIONS, device_of
from support.triton_attention import moved, quick_config, skip_unless_computed

from hstu_cli.kernels import append_to_pages, hstu_attention, hstu_paged_attention
from hstu_cli.kernels.attention import blocked as attention_blocked
from hstu_cli.kernels.paged_attention.cases import PAGED_CASES, PagedCase, PagedInputs, make_paged_inputs

pytestmark = pytest.mark.usefixtures(quick_config.__name__)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def run(inputs: PagedInputs, impl: str, **replaced: object) -> torch.Tensor:
    skip_unless_computed(impl, inputs.new.q.dtype)
    device = device_of(impl)
    new = moved(inputs.new, impl)
    arguments = {
        "q": new.q,
        "k": new.k,
        "v": new.v,
        "seq_offsets": new.seq_offsets,
        "num_candidates": new.num_candidates,
        "pages": inputs.pages.to(device),
        "page_indptr": inputs.page_indptr,
        "page_ids": inputs.page_ids,
        "cached_lengths": inputs.cached_lengths,
        **{name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in replaced.items()},
    }
    return hstu_paged_attention(**arguments, alpha=new.alpha, scaling_seqlen=new.scaling_seqlen, impl=impl).cpu()


def oracle(inputs: PagedInputs) -> torch.Tensor:
    """The new rows of dense attention over the whole sequences, float64."""
    whole = inputs.whole
    out = hstu_attention(
        whole.q.double(),
        whole.k.double(),
        whole.v.double(),
        whole.seq_offsets,
        whole.num_candidates,
        alpha=whole.alpha,
        scaling_seqlen=whole.scaling_seqlen,
        impl="reference",
    )
    return out[inputs.new_rows]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PAGED_CASES, ids=lambda case: case.id)
def test_cached_rows_equal_those_of_the_whole_sequence(case: PagedCase, dtype: torch.dtype, impl: str) -> None:
    inputs = make_paged_inputs(case, dtype)
    expected = oracle(inputs)
    whole = inputs.whole
    plain = hstu_attention(
        whole.q, whole.k, whole.v, whole.seq_offsets, whole.num_candidates,
        alpha=whole.alpha, scaling_seqlen=whole.scaling_seqlen, impl="reference",
    )[inputs.new_rows]  # fmt: skip
    out = run(inputs, impl)
    assert out.shape == inputs.new.q.shape
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert torch.isfinite(out).all()
    scale = expected.norm() + torch.finfo(torch.float64).tiny
    # In float64 the plain formula is the oracle itself, so that its error says nothing.
    rounding = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-14
    budget = 2 * ((plain.double() - expected).norm() / scale + rounding)
    assert (out.double() - expected).norm() / scale <= budget


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_lies_behind_the_cached_tokens_does_not_matter(impl: str) -> None:
    """Unused slots and pages hold NaN, as memory that was never written may."""
    case = PAGED_CASES[3]
    inputs = make_paged_inputs(case, torch.float32)
    expected = run(inputs, impl)
    used = torch.zeros(inputs.pages.shape[0], case.page_size, dtype=torch.bool)
    bounds = inputs.page_indptr.tolist()
    for start, length in zip(bounds, case.cached, strict=False):
        for token in range(length):
            used[inputs.page_ids[start + token // case.page_size], token % case.page_size] = True
    poisoned = torch.where(used[:, None, :, None, None], inputs.pages, float("nan"))
    torch.testing.assert_close(run(inputs, impl, pages=poisoned), expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_pages_beyond_the_cached_length_may_be_listed(impl: str) -> None:
    """A page table may hold pages that are reserved for tokens to come."""
    inputs = make_paged_inputs(PAGED_CASES[2], torch.float32)
    spare = [page for page in range(inputs.pages.shape[0]) if page not in inputs.page_ids.tolist()]
    tables = inputs.page_ids.tensor_split(inputs.page_indptr[1:-1])
    longer = [torch.cat([table, torch.tensor(spare[i : i + 1])]) for i, table in enumerate(tables)]
    indptr = torch.tensor([0, *map(len, longer)]).cumsum(0)
    out = run(inputs, impl, page_ids=torch.cat(longer), page_indptr=indptr)
    torch.testing.assert_close(out, run(inputs, impl), rtol=0, atol=0)


def test_grouping_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_paged_inputs(PAGED_CASES[4], torch.float64)
    together = run(inputs, "blocked")
    monkeypatch.setattr(attention_blocked, "GROUPED_SCORES", 0)
    torch.testing.assert_close(run(inputs, "blocked"), together, rtol=1e-12, atol=1e-14)


def test_wrong_inputs_are_refused() -> None:
    inputs = make_paged_inputs(PAGED_CASES[2], torch.float32)
    wrong = [
        ({"pages": inputs.pages[0]}, "pages must be"),
        ({"pages": inputs.pages[..., :16]}, "pages must be"),
        ({"pages": inputs.pages.double()}, "pages must be torch.float32"),
        ({"page_ids": inputs.page_ids + 1000}, "page_ids holds 10"),
        ({"page_ids": -inputs.page_ids - 1}, "page_ids holds -"),
        ({"page_ids": inputs.page_ids.float()}, "page_ids must be"),
        ({"page_indptr": inputs.page_indptr[:-1]}, "3 sequences"),
        ({"page_indptr": inputs.page_indptr.flip(0)}, "page_indptr must rise"),
        ({"cached_lengths": inputs.cached_lengths[:-1]}, "3 sequences"),
        ({"cached_lengths": inputs.cached_lengths + 100}, "cached_lengths holds 116"),
        ({"cached_lengths": -inputs.cached_lengths}, "cached_lengths holds -16"),
        ({"seq_offsets": inputs.new.seq_offsets + 1}, "seq_offsets must run"),
    ]
    for replaced, message in wrong:
        with pytest.raises(ValueError, match=message):
            run(inputs, "blocked", **replaced)
    with pytest.raises(ValueError, match="scaling_seqlen"):
        hstu_paged_attention(
            *(getattr(inputs.new, name) for name in ("q", "k", "v", "seq_offsets", "num_candidates")),
            inputs.pages, inputs.page_indptr, inputs.page_ids, inputs.cached_lengths, alpha=1.0, scaling_seqlen=0,
        )  # fmt: skip


@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_append_writes_the_slots_and_no_other(page_size: int) -> None:
    generator = torch.Generator().manual_seed(page_size)
    pages = torch.randn(6, 2, page_size, 3, 4, generator=generator)
    k, v = torch.randn(2, 9, 3, 4, generator=generator)
    slots = torch.randperm(6 * page_size, generator=generator)[:5]
    rows = torch.tensor([8, 0, 3, 1, 7])
    expected = pages.clone()
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        expected[slot // page_size, 0, slot % page_size] = k[row]
        expected[slot // page_size, 1, slot % page_size] = v[row]
    append_to_pages(k, v, rows, pages, slots)
    assert torch.equal(pages, expected)


def test_append_refuses_what_does_not_fit() -> None:
    pages, k, one = torch.zeros(2, 2, 4, 3, 4), torch.zeros(5, 3, 4), torch.tensor([1])
    with pytest.raises(ValueError, match="do not fit"):
        append_to_pages(k[..., :2], k[..., :2], one, pages, one)
    with pytest.raises(ValueError, match="do not fit"):
        append_to_pages(k, k, one, pages, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="one dtype"):
        append_to_pages(k.double(), k.double(), one, pages, one)
