"""Appending keys and values to pages: exactly the named slots, whatever the strides, and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.implementations import device_of

from hstu_cli.kernels import append_to_pages
from hstu_cli.kernels.append_pages import choose_append_impl

IMPLEMENTATIONS = (
    "torch",
    pytest.param("native", marks=pytest.mark.native),
    pytest.param("triton", marks=pytest.mark.triton),
)
every_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def appended(
    dtype: torch.dtype, impl: str, *, tokens: int, count: int, heads: int, head_dim: int, page_size: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pages after appending `count` of so many tokens, and what they must be."""
    generator = torch.Generator().manual_seed(seed)
    num_pages = count // page_size + 2
    pages = torch.randn(num_pages, 2, page_size, heads, head_dim, generator=generator).to(dtype)
    wide = torch.randn(tokens, 4, heads, head_dim, generator=generator).to(dtype)
    k, v = wide[:, 3], wide[:, 1]  # strided, as parts of u, v, q, k are
    rows = torch.randperm(tokens, generator=generator)[:count]
    slots = torch.randperm(num_pages * page_size, generator=generator)[:count]
    expected = pages.clone()
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        expected[slot // page_size, 0, slot % page_size] = k[row]
        expected[slot // page_size, 1, slot % page_size] = v[row]
    device = device_of(impl)
    target = pages.to(device)
    append_to_pages(k.to(device), v.to(device), rows.to(device), target, slots.to(device), impl=impl)
    return target.cpu(), expected


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@settings(max_examples=20)
@given(data=st.data())
def test_writes_these_slots_and_no_other(impl: str, dtype: torch.dtype, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(0, 70), "tokens")
    found, expected = appended(
        dtype,
        impl,
        tokens=tokens,
        count=data.draw(st.integers(0, tokens), "count"),
        heads=data.draw(st.sampled_from([1, 3, 4]), "heads"),
        head_dim=data.draw(st.sampled_from([1, 8, 40, 64]), "head_dim"),
        page_size=data.draw(st.sampled_from([1, 16, 32]), "page_size"),
        seed=data.draw(st.integers(0, 99), "seed"),
    )
    assert torch.equal(found, expected)


@pytest.mark.native
def test_many_rows_on_many_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found, expected = appended(
            torch.bfloat16, "native", tokens=3000, count=2900, heads=4, head_dim=64, page_size=32, seed=0
        )
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, expected)


@pytest.mark.native
@pytest.mark.parametrize(("row", "slot"), [(5, 0), (-1, 0), (0, 32), (0, -1)])
def test_native_writes_nothing_outside(row: int, slot: int) -> None:
    k, pages = torch.zeros(5, 2, 8), torch.ones(2, 2, 16, 2, 8)
    with pytest.raises(ValueError, match=r"no (row|slot) "):
        append_to_pages(k, k, torch.tensor([0, row]), pages, torch.tensor([1, slot]), impl="native")
    assert (pages == 1).all()


@pytest.mark.native
def test_auto_takes_native_operators_where_they_are_built() -> None:
    assert choose_append_impl("auto", "cpu", torch.float32).name == "native"
    assert choose_append_impl("auto", "npu", torch.float32).name == "torch"
