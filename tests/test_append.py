"""Appending keys and values to pages: every implementation writes the same, and is chosen as asked."""

import sys
import types
from collections.abc import Callable

import pytest
import torch

from hstu_cli.errors import UnavailableError, UsageError
from hstu_cli.kernels import append_to_pages
from hstu_cli.kernels.append_pages import APPEND_IMPLEMENTATIONS, choose_append_impl
from hstu_cli.kernels.append_pages import flashinfer as flashinfer_append

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


@pytest.mark.parametrize(("num_tokens", "num_new"), [(1, 1), (9, 0), (9, 5), (20, 20)])
def test_torch_writes_the_rows_to_their_slots_alone(num_tokens: int, num_new: int) -> None:
    arguments = inputs(num_tokens, num_new)
    expected = expected_pages(*arguments)
    append_to_pages(*arguments, impl="torch")
    torch.testing.assert_close(arguments[3], expected, rtol=0, atol=0, equal_nan=True)


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
    chosen = choose_append_impl("auto", "cpu", torch.float32, head_dim=32)
    assert (chosen.name, chosen.reason) == ("torch", "auto: the one for cpu")
    assert choose_append_impl("torch", "cuda", torch.float32).reason == "as requested"
    with pytest.raises(UsageError, match="choose from auto, triton, flashinfer, torch"):
        choose_append_impl("fast", "cpu", torch.float32)
    with pytest.raises(UnavailableError, match="--append-impl flashinfer: FlashInfer runs on NVIDIA GPUs alone"):
        choose_append_impl("flashinfer", "cpu", torch.float32)
    with pytest.raises(UnavailableError, match="--append-impl triton: "):
        choose_append_impl("triton", "npu", torch.float32)


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
