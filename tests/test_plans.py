"""Plans: a batch is validated and moved once, and layers then wait for nothing."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hstu_cli.config import MODEL_PRESETS
from hstu_cli.kernels import hstu_attention, jagged_attention, paged_attention, plan_batch, plan_pages
from hstu_cli.kernels.attention.cases import AttentionCase, make_inputs
from hstu_cli.kernels.paged_attention.cases import PAGED_CASES, make_paged_inputs
from hstu_cli.model.layer import HSTUBlock, JaggedAttention

TINY = MODEL_PRESETS["tiny"]
INPUTS = make_inputs(AttentionCase((30, 0, 3), (2, 1, 0)), torch.float32)
SCALES = {"alpha": INPUTS.alpha, "scaling_seqlen": INPUTS.scaling_seqlen}


def test_a_plan_says_where_the_sequences_are() -> None:
    plan = plan_batch(INPUTS.seq_offsets, INPUTS.num_candidates, 36, "cpu")
    assert plan.seq_offsets.dtype == plan.num_candidates.dtype == torch.int32
    assert plan.seq_offsets.tolist() == plan.offsets == [0, 32, 33, 36]
    assert plan.num_candidates.tolist() == plan.candidates == [2, 1, 0]
    assert (plan.num_tokens, plan.num_sequences, plan.max_new_tokens) == (36, 3, 32)
    assert plan_batch(INPUTS.seq_offsets, None, 36, "cpu").num_candidates.tolist() == [0, 0, 0]
    empty = plan_batch(torch.tensor([0]), None, 0, "cpu")
    assert (empty.num_sequences, empty.max_new_tokens) == (0, 0)


def test_a_plan_of_pages_says_where_cached_tokens_are() -> None:
    plan = plan_pages(
        torch.tensor([0, 2, 2, 5]), torch.tensor([7, 3, 1, 9, 4]), torch.tensor([17, 0, 32]),
        num_sequences=3, num_pages=10, page_size=16, device="cpu",
    )  # fmt: skip
    assert plan.tables == [[7, 3], [], [1, 9]]  # page 4 is reserved for tokens to come
    assert plan.page_ids.tolist() == [7, 3, 1, 9, 4]
    assert plan.lengths == plan.cached_lengths.tolist() == [17, 0, 32]
    assert {t.dtype for t in (plan.page_indptr, plan.page_ids, plan.cached_lengths)} == {torch.int32}
    assert (plan.num_pages, plan.page_size, plan.max_cached_tokens) == (10, 16, 32)


@pytest.mark.parametrize("num_tokens", [35, 37])
def test_a_plan_for_another_number_of_tokens_is_refused(num_tokens: int) -> None:
    plan = plan_batch(torch.tensor([0, num_tokens]), None, num_tokens, "cpu")
    with pytest.raises(ValueError, match=f"planned for {num_tokens} tokens on cpu, not 36"):
        jagged_attention(INPUTS.q, INPUTS.k, INPUTS.v, plan, **SCALES)


def test_a_plan_for_another_device_is_refused() -> None:
    plan = plan_batch(INPUTS.seq_offsets, INPUTS.num_candidates, 36, "meta")
    with pytest.raises(ValueError, match="planned for 36 tokens on meta, not 36 on cpu"):
        jagged_attention(INPUTS.q, INPUTS.k, INPUTS.v, plan, **SCALES)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_a_plan_without_host_numbers_is_for_triton_alone(impl: str) -> None:
    plan = plan_batch(INPUTS.seq_offsets, INPUTS.num_candidates, 36, "cpu")
    plan = dataclasses.replace(plan, offsets=None, candidates=None)
    with pytest.raises(ValueError, match="on the device alone, which impl='triton' can use"):
        jagged_attention(INPUTS.q, INPUTS.k, INPUTS.v, plan, **SCALES, impl=impl)


def test_page_tables_for_another_pool_or_batch_are_refused() -> None:
    inputs = make_paged_inputs(PAGED_CASES[2], torch.float32)
    new, pages = inputs.new, inputs.pages
    plan = plan_batch(new.seq_offsets, new.num_candidates, len(new.q), "cpu")
    sizes = {"num_sequences": 3, "num_pages": len(pages), "page_size": 16, "device": "cpu"}
    page_plan = plan_pages(inputs.page_indptr, inputs.page_ids, inputs.cached_lengths, **sizes)
    other = plan_pages(torch.tensor([0]), torch.tensor([], dtype=torch.int32), torch.tensor([], dtype=torch.int32),
                       **sizes | {"num_sequences": 0})  # fmt: skip
    scales = {"alpha": new.alpha, "scaling_seqlen": new.scaling_seqlen}
    assert paged_attention(new.q, new.k, new.v, plan, pages, page_plan, **scales).isfinite().all()
    for wrong_pages, wrong_plan in ((pages[1:], page_plan), (pages[:, :, :8], page_plan), (pages, other)):
        with pytest.raises(ValueError, match="page tables were planned for"):
            paged_attention(new.q, new.k, new.v, plan, wrong_pages, wrong_plan, **scales)


class Copies(TorchDispatchMode):
    """Counts what moves or converts tensors, or reads one number of them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "_to_copy", "nonzero")
        return func(*args, **(kwargs or {}))


def test_layers_of_a_planned_batch_read_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """`plan_batch` may copy and read, which waits for a device; the layers may not."""
    read, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: read.append(tensor) or tolist(tensor))
    block = HSTUBlock(TINY).eval()
    with torch.no_grad(), Copies() as copies:
        plan = plan_batch(torch.tensor([0, 20, 50]), torch.tensor([3, 4]), 50, "cpu")
        assert (copies.count, len(read)) == (2, 2)  # offsets and counts: read, and as int32
        block(torch.randn(50, TINY.hidden_dim), JaggedAttention(TINY, plan, "reference"))
    assert (copies.count, len(read)) == (2, 2)


def test_planned_and_public_function_agree() -> None:
    plan = plan_batch(INPUTS.seq_offsets, INPUTS.num_candidates, 36, "cpu")
    arguments = (INPUTS.q, INPUTS.k, INPUTS.v)
    whole = hstu_attention(*arguments, INPUTS.seq_offsets, INPUTS.num_candidates, **SCALES, impl="blocked")
    assert torch.equal(jagged_attention(*arguments, plan, **SCALES, impl="blocked"), whole)
