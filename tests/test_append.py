"""Appending keys and values to pages: every implementation writes the same, and is chosen as asked."""

import sys
import types
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.implementations import device_of

from hstu_cli.errors import UnavailableError, UsageError
from hstu_cli.kernels import append_to_pages
from hstu_cli.kernels.append_pages import APPEND_IMPLEMENTATIONS, choose_append_impl
from hstu_cli.kernels.append_pages import flashinfer as flashinfer_append
from hstu_cli.kernels.native.build import native_state

NUM_PAGES, PAGE_SIZE, HEADS, HEAD_DIM = 5, 4, 2, 64


def inputs(num_tokens: int, num_new: int, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, ...]:
    """Strided keys and values as a layer makes them, some of their rows, poisoned pages, and a slot for each row."""
    generator = torch.Generator().manual_seed(num_new)
    k, v = torch.randn(num_tokens, 4, HEADS, HEAD_DIM, generator=generator).to(dtype).unbind(1)[:2]
    rows = torch.randperm(num_tokens, generator=generator)[:num_new]
    slots = torch.randperm(NUM_PAGES * PAGE_SIZE, generator=generator)[:num_new]
    pages = torch.full((NUM_PAGES, 2, PAGE_SIZE, HEADS, HEAD_DIM), torch.nan, dtype=dtype)
    return k, v, rows, pages, slots


def expected_pages(
    k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """The pages after every row was copied on its own."""
    pages = pages.clone()
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        pages[slot // PAGE_SIZE, 0, slot % PAGE_SIZE] = k[row]
        pages[slot // PAGE_SIZE, 1, slot % PAGE_SIZE] = v[row]
    return pages


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A module with the signature of FlashInfer's function, and what its documentation says it does, in torch.

    It shows that the arguments are right; the kernel itself runs on an NVIDIA GPU alone.
    """
    calls: list[int] = []

    def append_paged_kv_cache(
        append_key: torch.Tensor,
        append_value: torch.Tensor,
        batch_indices: torch.Tensor,
        positions: torch.Tensor,
        paged_kv_cache: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_last_page_len: torch.Tensor,
        kv_layout: str = "NHD",
    ) -> None:
        assert kv_layout == "NHD"
        for tensor in (batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len):
            assert tensor.dtype == torch.int32
            assert tensor.is_contiguous()
        assert append_key.stride(-1) == append_value.stride(-1) == paged_kv_cache.stride(-1) == 1
        assert len(kv_indptr) == len(kv_last_page_len) + 1
        page_size = paged_kv_cache.shape[2]
        lengths = (kv_indptr.diff() - 1) * page_size + kv_last_page_len
        for row, (sequence, position) in enumerate(zip(batch_indices.tolist(), positions.tolist(), strict=True)):
            assert 0 <= position < lengths[sequence]
            page = kv_indices[kv_indptr[sequence] + position // page_size]
            paged_kv_cache[page, 0, position % page_size] = append_key[row]
            paged_kv_cache[page, 1, position % page_size] = append_value[row]
        calls.append(len(positions))

    package, module = types.ModuleType("flashinfer"), types.ModuleType("flashinfer.page")
    module.append_paged_kv_cache = append_paged_kv_cache
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.page", module)
    return calls


WITHOUT_FLASHINFER = (
    "torch",
    pytest.param("native", marks=pytest.mark.native),
    pytest.param("triton", marks=pytest.mark.triton),
)


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


@pytest.mark.parametrize("impl", WITHOUT_FLASHINFER)
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


@pytest.mark.parametrize("impl", WITHOUT_FLASHINFER[:2])
@pytest.mark.parametrize(("row", "slot"), [(5, 0), (-1, 0), (0, 32), (0, -1)])
def test_what_is_outside_is_an_error(row: int, slot: int, impl: str) -> None:
    k, pages = torch.zeros(5, 2, 8), torch.ones(2, 2, 16, 2, 8)
    with pytest.raises(ValueError, match=r"no (row|slot) "):
        append_to_pages(k, k, torch.tensor([0, row]), pages, torch.tensor([1, slot]), impl=impl)
    assert (pages == 1).all()


@pytest.mark.triton
@pytest.mark.parametrize(("row", "slot"), [(5, 0), (-1, 0), (0, 32), (0, -1)])
def test_triton_leaves_out_what_is_outside(row: int, slot: int) -> None:
    device = device_of("triton")
    k, whole = torch.zeros(5, 2, 8, device=device), torch.ones(4, 2, 16, 2, 8, device=device)
    pages = whole[1:3]  # what lies before and behind must not change
    places = (torch.tensor([0, row], device=device), torch.tensor([1, slot], device=device))
    append_to_pages(k, k, places[0], pages, places[1], impl="triton")
    assert (pages[0, :, 1] == 0).all()
    assert int((whole == 0).sum()) == 2 * 2 * 8


@pytest.mark.parametrize(("num_tokens", "num_new"), [(1, 1), (9, 5), (20, 20)])
def test_flashinfer_is_asked_for_the_same(stand_in: list[int], num_tokens: int, num_new: int) -> None:
    arguments = inputs(num_tokens, num_new)
    expected = expected_pages(*arguments)
    append_to_pages(*arguments, impl="flashinfer")
    torch.testing.assert_close(arguments[3], expected, rtol=0, atol=0, equal_nan=True)
    assert stand_in == [num_new]


def test_flashinfer_needs_an_nvidia_gpu_a_package_and_what_it_is_compiled_for(
    stand_in: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    why: Callable[..., str | None] = flashinfer_append.why_unavailable
    assert why("cuda", torch.bfloat16, 256) is why("cuda", torch.float16) is None
    assert "NVIDIA GPUs alone" in why("cpu", torch.bfloat16, 256)
    assert "not torch.float32" in why("cuda", torch.float32, 256)
    assert "64, 128, 256, not 32" in why("cuda", torch.bfloat16, 32)
    monkeypatch.setitem(sys.modules, "flashinfer.page", None)
    assert "pip install flashinfer-python" in why("cuda", torch.bfloat16, 256)


def test_the_choice_is_kept_or_refused() -> None:
    built = native_state().available
    chosen = choose_append_impl("auto", "cpu", torch.float32, head_dim=32)
    assert chosen.name == ("native" if built else "torch")
    assert choose_append_impl("auto", "npu", torch.float32).name == "torch"
    assert choose_append_impl("torch", "cuda", torch.float32).reason == "as requested"
    for device, dtype in (("cpu", torch.float32), ("npu", torch.bfloat16)):
        with pytest.raises(UsageError, match="There is no --append-impl 'fast'; choose from ") as caught:
            choose_append_impl("fast", device, dtype)
        offered = str(caught.value).partition("choose from ")[2].rstrip(".").split(", ")
        assert {"auto", "torch"} <= set(offered)
        assert [choose_append_impl(name, device, dtype).name for name in offered[1:]] == offered[1:]
    with pytest.raises(UnavailableError, match="--append-impl flashinfer: FlashInfer runs on NVIDIA GPUs alone"):
        choose_append_impl("flashinfer", "cpu", torch.float32)
    for name, where, device in (("triton", "an NVIDIA GPU", "npu"), ("native", "a CPU", "cuda")):
        with pytest.raises(UsageError, match=f"--append-impl {name} runs on {where}, not on {device}; choose"):
            choose_append_impl(name, device, torch.float32)


@pytest.mark.parametrize(
    ("impl", "device"),
    [("reference", "cpu"), ("blocked", "cpu"), ("blocked", "cuda"), ("ascend", "npu")],
)
def test_auto_follows_the_other_operators(impl: str, device: str) -> None:
    chosen = choose_append_impl("auto", device, torch.float32, impl=impl)
    assert (chosen.name, chosen.reason) == ("torch", f"auto: as --impl {impl}")
    assert choose_append_impl("torch", device, torch.float32, impl=impl).reason == "as requested"


@pytest.mark.native
def test_auto_follows_native_operators_too() -> None:
    assert native_state().available
    assert choose_append_impl("native", "cpu", torch.float32, impl="blocked").name == "native", "both may be named"
    chosen = choose_append_impl("auto", "cpu", torch.float32, impl="native")
    assert (chosen.name, chosen.reason) == ("native", "auto: as --impl native")


@pytest.mark.triton
def test_auto_follows_triton_where_its_kernels_run() -> None:
    assert choose_append_impl("auto", device_of("triton"), torch.float32, impl="triton").name == "triton"


def test_auto_takes_flashinfer_where_triton_cannot_run(stand_in: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    absent = types.SimpleNamespace(available=False, reason="triton is not installed")
    monkeypatch.setattr("hstu_cli.kernels.append_pages.triton_state", lambda: absent)
    chosen = choose_append_impl("auto", "cuda", torch.bfloat16, head_dim=128)
    assert (chosen.name, chosen.reason) == ("flashinfer", "auto: triton is not installed")
    assert choose_append_impl("auto", "cuda", torch.bfloat16, head_dim=32).name == "torch"


def test_inputs_that_do_not_fit_are_refused() -> None:
    k, v, rows, pages, slots = inputs(9, 5)
    for arguments in (
        (k, v, rows, pages[..., :32], slots),
        (k, v, rows[1:], pages, slots),
        (k, v.float(), rows, pages, slots),
    ):
        with pytest.raises(ValueError, match="k"):
            append_to_pages(*arguments)
    with pytest.raises(ValueError, match=f"impl must be one of {', '.join(APPEND_IMPLEMENTATIONS)}"):
        append_to_pages(k, v, rows, pages, slots, impl="auto")
