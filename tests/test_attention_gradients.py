"""Gradients of attention: exact in float64, within the reference's own error in narrow dtypes."""

import pytest
import torch

from hstu_cli.kernels import hstu_attention
from hstu_cli.kernels.attention import blocked
from hstu_cli.kernels.attention.cases import ATTENTION_CASES, AttentionCase, AttentionInputs, make_inputs

CASES = [case for case in ATTENTION_CASES if case.history]  # the reference builds no graph for no sequence
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_implementation = pytest.mark.parametrize("impl", ["blocked", pytest.param("native", marks=pytest.mark.native)])
NARROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _poisoned_memory_and_one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(num_threads)


def gradients(inputs: AttentionInputs, impl: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Gradients of q, k and v for a fixed gradient of the output."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = hstu_attention(
        *leaves,
        inputs.seq_offsets,
        inputs.num_candidates,
        alpha=inputs.alpha,
        scaling_seqlen=inputs.scaling_seqlen,
        impl=impl,
    )
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad(out, leaves, grad_out.to(inputs.q.dtype).to(dtype)))


@every_implementation
@every_case
def test_gradients_are_those_of_the_formula(case: AttentionCase, impl: str) -> None:
    inputs = make_inputs(case, torch.float64)
    for own, expected in zip(
        gradients(inputs, impl, torch.float64), gradients(inputs, "reference", torch.float64), strict=True
    ):
        torch.testing.assert_close(own, expected, rtol=1e-11, atol=1e-12)


@every_implementation
@pytest.mark.parametrize("dtype", NARROW_DTYPES, ids=str)
@every_case
def test_rounding_errors_are_no_larger_than_the_references(case: AttentionCase, dtype: torch.dtype, impl: str) -> None:
    inputs = make_inputs(case, dtype)
    exact = gradients(inputs, "reference", torch.float64)
    for own, plain, true in zip(
        gradients(inputs, impl, dtype), gradients(inputs, "reference", dtype), exact, strict=True
    ):
        assert own.dtype == dtype
        if true.numel():
            rounding = torch.finfo(dtype).eps * true.abs().max()
            assert (own - true).abs().max() <= 2 * ((plain - true).abs().max() + rounding)


@every_implementation
def test_the_function_passes_gradcheck(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK_ROWS", 4)  # strips of history, of both, and of candidates alone
    inputs = make_inputs(AttentionCase((6, 0, 3), (11, 2, 0), num_heads=2, head_dim=3), torch.float64)
    leaves = [x.contiguous().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]

    def attention(*qkv: torch.Tensor) -> torch.Tensor:
        return hstu_attention(*qkv, inputs.seq_offsets, inputs.num_candidates, alpha=0.7, scaling_seqlen=3, impl=impl)

    assert torch.autograd.gradcheck(attention, leaves)


@every_implementation
def test_values_are_the_same_with_and_without_gradients(impl: str) -> None:
    inputs = make_inputs(CASES[5], torch.float32)
    arguments = (inputs.seq_offsets, inputs.num_candidates)
    scales = {"alpha": inputs.alpha, "scaling_seqlen": inputs.scaling_seqlen}
    plain = hstu_attention(inputs.q, inputs.k, inputs.v, *arguments, **scales, impl=impl)
    kept = hstu_attention(inputs.q.detach().requires_grad_(), inputs.k, inputs.v, *arguments, **scales, impl=impl)
    assert kept.requires_grad
    torch.testing.assert_close(kept.detach(), plain, rtol=0, atol=0)
