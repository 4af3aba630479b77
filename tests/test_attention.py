"""Jagged HSTU attention: every implementation against a float64 oracle, and what a token may depend on."""

import dataclasses
import functools
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.implementations import IMPLEMENTATIONS
from support.triton_attention import moved, quick_config, skip_unless_computed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hstu_cli.kernels import hstu_attention
from hstu_cli.kernels.attention import blocked
from hstu_cli.kernels.attention.cases import ATTENTION_CASES, AttentionCase, AttentionInputs, make_inputs

NARROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*NARROW_DTYPES, torch.float64)
ROUNDINGS = 8
"""More roundings than any element passes on its way: product, alpha, SiLU, L, the two halves of L, sum, own score."""

pytestmark = pytest.mark.usefixtures(quick_config.__name__)
every_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
every_case = pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.id)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _poisoned_memory_and_one_thread():
    """Fresh tensors start as NaN, so that an element that is never written shows.

    One thread: these sizes gain nothing from more, and parallel regions cost milliseconds beside another busy process.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(num_threads)


def run(inputs: AttentionInputs, impl: str) -> torch.Tensor:
    skip_unless_computed(impl, inputs.q.dtype)
    inputs = moved(inputs, impl)
    return hstu_attention(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.seq_offsets,
        inputs.num_candidates,
        alpha=inputs.alpha,
        scaling_seqlen=inputs.scaling_seqlen,
        impl=impl,
    ).cpu()


@functools.cache
def mask(num_tokens: int, num_candidates: int) -> torch.Tensor:
    """M [N, N] float64, row by row as docs/model.md says it."""
    num_before = num_tokens - num_candidates
    rows = torch.zeros(num_tokens, num_tokens, dtype=torch.float64)
    for i in range(num_tokens):
        rows[i, : min(i + 1, num_before)] = 1
        rows[i, i] = 1
    return rows


def oracle(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The float64 result [T, H, d], and per element the error that rounding every operation once may make.

    The derivative of SiLU is at most 1.1. Below the normal range rounding is absolute.
    """
    limits = torch.finfo(inputs.q.dtype)
    expected = torch.zeros(inputs.q.shape, dtype=torch.float64)
    bound = torch.zeros_like(expected)
    ends = pairwise(inputs.seq_offsets.tolist())
    for (start, end), num_candidates in zip(ends, inputs.num_candidates.tolist(), strict=True):
        visible = mask(end - start, num_candidates)
        for head in range(inputs.q.shape[1]):
            q, k, v = (x[start:end, head].double() for x in (inputs.q, inputs.k, inputs.v))
            scores = inputs.alpha * (q @ k.T)
            silu = scores * torch.sigmoid(scores)
            sensitivity = 1.1 * abs(inputs.alpha) * (q.abs() @ k.abs().T) + silu.abs()
            expected[start:end, head] = (silu * visible / inputs.scaling_seqlen) @ v
            relative = (sensitivity * visible / inputs.scaling_seqlen) @ v.abs()
            absolute = visible @ v.abs() + 1
            bound[start:end, head] = ROUNDINGS * (
                limits.eps * relative + limits.smallest_normal * limits.eps * absolute
            )
    return expected, bound


def largest(values: torch.Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


@every_implementation
@every_dtype
@every_case
def test_error_is_what_rounding_explains(case: AttentionCase, dtype: torch.dtype, impl: str) -> None:
    inputs = make_inputs(case, dtype)
    before = [tensor.clone() for tensor in (inputs.q, inputs.k, inputs.v, inputs.seq_offsets, inputs.num_candidates)]
    output = run(inputs, impl)
    after = (inputs.q, inputs.k, inputs.v, inputs.seq_offsets, inputs.num_candidates)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert output.dtype == dtype
    assert output.shape == inputs.q.shape
    assert output.is_contiguous()
    assert output.isfinite().all()
    expected, bound = oracle(inputs)
    error = (output.double() - expected).abs()
    assert (error <= bound).all(), f"{(error / bound).max():.3} times the bound"


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS[1:], "auto"])
@pytest.mark.parametrize("dtype", NARROW_DTYPES, ids=str)
@every_case
def test_error_is_at_most_twice_that_of_the_reference(case: AttentionCase, dtype: torch.dtype, impl: str) -> None:
    inputs = make_inputs(case, dtype, seed=1)
    expected, _ = oracle(inputs)
    error, reference_error = (largest(run(inputs, name).double() - expected) for name in (impl, "reference"))
    rounding = torch.finfo(dtype).eps * largest(expected)
    assert error <= 2 * (reference_error + rounding)


@every_implementation
def test_sums_beyond_the_range_of_fp16_stay_finite(impl: str) -> None:
    # Each score is about 100 and each sum over the keys 200,000, three times what fp16 holds, before the division by L.
    inputs = make_inputs(AttentionCase((2000,), (3,), num_heads=1, head_dim=16), torch.float16)
    ones = torch.ones_like(inputs.q)
    inputs = dataclasses.replace(inputs, q=ones * 20, k=ones * 1.25, v=ones, scaling_seqlen=8398)
    output = run(inputs, impl)
    expected, bound = oracle(inputs)
    assert expected.amax() > 20
    assert ((output.double() - expected).abs() <= bound).all()


@every_implementation
@pytest.mark.parametrize("layout", ["heads_first", "every_second_channel", "expanded_heads"])
def test_any_strides_give_the_same_result(layout: str, impl: str) -> None:
    dtype = torch.float32 if impl == "triton" else torch.float64
    inputs = make_inputs(AttentionCase((30, 3), (4, 5), num_heads=3, head_dim=8), dtype)
    views = {}
    for name in ("q", "k", "v"):
        tensor = getattr(inputs, name)
        match layout:
            case "heads_first":
                views[name] = tensor.transpose(0, 1).contiguous().transpose(0, 1)
            case "every_second_channel":
                views[name] = torch.stack([tensor, tensor + 1], dim=-1).flatten(2)[..., ::2]
            case "expanded_heads":
                views[name] = tensor[:, :1].expand_as(tensor)
    assert not any(view.is_contiguous() for view in views.values())
    strided = dataclasses.replace(inputs, **views)
    compact = dataclasses.replace(inputs, **{name: view.contiguous() for name, view in views.items()})
    close = {"rtol": 1e-13, "atol": 1e-15} if dtype == torch.float64 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(run(strided, impl), run(compact, impl), **close)


@every_implementation
def test_without_candidates_the_counts_may_be_left_out(impl: str) -> None:
    inputs = make_inputs(AttentionCase((30, 0, 3), (0, 0, 0)), torch.float32)
    assert torch.equal(run(dataclasses.replace(inputs, num_candidates=None), impl), run(inputs, impl))


@every_implementation
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_offsets_and_counts_take_both_integer_kinds(index_dtype: torch.dtype, impl: str) -> None:
    inputs = make_inputs(AttentionCase((30, 0, 3), (2, 1, 0)), torch.float32)
    indices = {name: getattr(inputs, name).to(index_dtype) for name in ("seq_offsets", "num_candidates")}
    assert torch.equal(run(dataclasses.replace(inputs, **indices), impl), run(inputs, impl))


@every_implementation
@pytest.mark.parametrize("case", [case for case in ATTENTION_CASES if len(case.history) > 1], ids=lambda case: case.id)
def test_a_sequence_does_not_depend_on_its_batch_mates(case: AttentionCase, impl: str) -> None:
    inputs = make_inputs(case, torch.float32)
    together = run(inputs, impl)
    _, bound = oracle(inputs)
    for (start, end), count in zip(pairwise(inputs.seq_offsets.tolist()), inputs.num_candidates, strict=True):
        rows = slice(start, end)
        alone = dataclasses.replace(
            inputs,
            q=inputs.q[rows],
            k=inputs.k[rows],
            v=inputs.v[rows],
            seq_offsets=torch.tensor([0, end - start]),
            num_candidates=count[None],
        )
        assert ((run(alone, impl) - together[rows]).abs() <= bound[rows]).all()


def change_token(inputs: AttentionInputs, row: int) -> AttentionInputs:
    """The same inputs with other q, k and v in one row."""
    changed = {name: getattr(inputs, name).clone() for name in ("q", "k", "v")}
    for tensor in changed.values():
        tensor[row] = tensor[row].roll(1, dims=-1) + 3
    return dataclasses.replace(inputs, **changed)


def changed_rows(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    return torch.nonzero((before != after).flatten(1).any(1)).flatten().tolist()


# Sequence 1 of the batch: rows 20 to 319 are its history, 320 to 359 its candidates.
DEPENDENCE_CASE = AttentionCase((18, 300, 17), (2, 40, 3), num_heads=2, head_dim=16)


@every_implementation
@every_dtype
@pytest.mark.parametrize("row", [320, 337, 359])
def test_a_candidate_is_seen_by_itself_alone(row: int, dtype: torch.dtype, impl: str) -> None:
    inputs = make_inputs(DEPENDENCE_CASE, dtype)
    assert changed_rows(run(inputs, impl), run(change_token(inputs, row), impl)) == [row]


@every_implementation
@every_dtype
@pytest.mark.parametrize("row", [20, 21, 275, 276, 277, 319])
def test_a_history_token_is_seen_from_itself_onwards(row: int, dtype: torch.dtype, impl: str) -> None:
    inputs = make_inputs(DEPENDENCE_CASE, dtype)
    changed = changed_rows(run(inputs, impl), run(change_token(inputs, row), impl))
    if dtype == torch.float64:
        assert changed == list(range(row, 360))
    else:  # a narrow dtype may round a change away
        assert set(changed) <= set(range(row, 360))
        assert row in changed


@every_implementation
@pytest.mark.parametrize("case", [AttentionCase((40, 41, 42), (3, 3, 3)), DEPENDENCE_CASE], ids=lambda case: case.id)
def test_nan_stays_in_its_sequence(case: AttentionCase, impl: str) -> None:
    inputs = make_inputs(case, torch.float32)
    start, end = inputs.seq_offsets[1:3].tolist()
    poisoned = {name: getattr(inputs, name).clone() for name in ("q", "k", "v")}
    for tensor in poisoned.values():
        tensor[start:end] = torch.nan
    output, clean = run(dataclasses.replace(inputs, **poisoned), impl), run(inputs, impl)
    assert output[start:end].isnan().all()
    assert torch.equal(output[:start], clean[:start])
    assert torch.equal(output[end:], clean[end:])


class LargestOutput(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.num_elements = max(self.num_elements, *sizes, 0)
        return result


@pytest.mark.parametrize(("history", "candidates"), [(4096, 0), (4096, 1000), (10, 3000)])
def test_blocked_holds_no_more_than_one_strip(history: int, candidates: int) -> None:
    case = AttentionCase((history,), (candidates,), num_heads=2, head_dim=16)
    inputs = make_inputs(case, torch.float32)
    with LargestOutput() as output:
        run(inputs, "blocked")
    assert 0 < output.num_elements <= case.num_heads * blocked.BLOCK_ROWS * case.num_tokens


@pytest.mark.parametrize(
    ("history", "limit"),
    [
        ((200, *[1] * 30), 200 * 200),  # the short ones padded to the long one would hold 31 times that
        ((100,) * 400, blocked.GROUP_TOKENS * 100),  # all at once would hold 400 * 100 rows of 100 scores
    ],
    ids=["one long, many short", "many"],
)
def test_blocked_bounds_what_a_group_holds(history: tuple[int, ...], limit: int) -> None:
    inputs = make_inputs(AttentionCase(history, (0,) * len(history), num_heads=1, head_dim=4), torch.float32)
    with LargestOutput() as output:
        run(inputs, "blocked")
    assert inputs.q.numel() <= output.num_elements <= limit


@settings(max_examples=150)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=7),
    block_rows=st.sampled_from([1, 2, 7, 64]),
    grouped_scores=st.sampled_from([0, 5, 40]),
    group_tokens=st.sampled_from([1, 30, 200]),
    alpha=st.floats(0.01, 2.0),
    scaling_seqlen=st.integers(1, 10_000),
    seed=st.integers(0, 2**31),
)
def test_blocked_agrees_for_any_jagged_batch_and_block_size(
    lengths, block_rows, grouped_scores, group_tokens, alpha, scaling_seqlen, seed
) -> None:
    case = AttentionCase(tuple(h for h, _ in lengths), tuple(c for _, c in lengths), num_heads=2, head_dim=4)
    inputs = make_inputs(case, torch.float64, seed=seed)
    inputs = dataclasses.replace(inputs, alpha=alpha, scaling_seqlen=scaling_seqlen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "BLOCK_ROWS", block_rows)
        patch.setattr(blocked, "GROUPED_SCORES", grouped_scores)
        patch.setattr(blocked, "GROUP_TOKENS", group_tokens)
        output = run(inputs, "blocked")
    expected, bound = oracle(inputs)
    assert ((output - expected).abs() <= bound).all()


VALID = make_inputs(AttentionCase((3, 2), (1, 0), num_heads=2, head_dim=4), torch.float32)  # 4 + 2 tokens
MISTAKES = {
    "q of two dimensions": ({"q": torch.zeros(6, 8)}, r"q must be \[tokens, heads, head_dim\], not \[6, 8\]"),
    "k of another shape": ({"k": torch.zeros(6, 2, 5)}, r"k must be like q.*not \[6, 2, 5\]"),
    "v of another length": ({"v": torch.zeros(5, 2, 4)}, r"v must be like q.*not \[5, 2, 4\]"),
    "k of another dtype": ({"k": torch.zeros(6, 2, 4, dtype=torch.float16)}, "k must be like q.*torch.float16"),
    "v on another device": ({"v": torch.zeros(6, 2, 4, device="meta")}, "v must be like q.*on meta"),
    "integers": (dict.fromkeys("qkv", torch.zeros(6, 2, 4, dtype=torch.int64)), "floating point, not torch.int64"),
    "offsets that do not start at 0": ({"seq_offsets": torch.tensor([1, 4, 6])}, "seq_offsets.*from 1 to 6"),
    "offsets that end too early": ({"seq_offsets": torch.tensor([0, 4, 5])}, "6 tokens, not from 0 to 5"),
    "offsets past the end": ({"seq_offsets": torch.tensor([0, 4, 7])}, "6 tokens, not from 0 to 7"),
    "no offsets": ({"seq_offsets": torch.tensor([], dtype=torch.int64)}, "seq_offsets.*empty"),
    "decreasing offsets": ({"seq_offsets": torch.tensor([0, 7, 6])}, "seq_offsets must never decrease"),
    "float offsets": ({"seq_offsets": torch.tensor([0.0, 4.0, 6.0])}, "seq_offsets must be one row of int32 or int64"),
    "offsets in a table": ({"seq_offsets": torch.tensor([[0, 4, 6]])}, "seq_offsets must be one row"),
    "too few counts": ({"num_candidates": torch.tensor([1])}, "each of 2 sequences, not 1"),
    "too many counts": ({"num_candidates": torch.tensor([1, 0, 0])}, "each of 2 sequences, not 3"),
    "a count above the length": ({"num_candidates": torch.tensor([5, 0])}, "5 for a sequence of 4 tokens"),
    "a negative count": ({"num_candidates": torch.tensor([1, -1])}, "-1 for a sequence of 2 tokens"),
    "float counts": ({"num_candidates": torch.tensor([1.0, 0.0])}, "num_candidates must be one row"),
    "a divisor of 0": ({"scaling_seqlen": 0}, "scaling_seqlen must be at least 1, not 0"),
    "a negative divisor": ({"scaling_seqlen": -3}, "scaling_seqlen must be at least 1, not -3"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_inputs_that_do_not_fit_are_refused(mistake: str) -> None:
    changes, message = MISTAKES[mistake]
    assert run(VALID, "reference").isfinite().all()
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(VALID, **changes), "reference")


def test_an_unknown_implementation_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'fast'; choose auto, reference, blocked"):
        run(VALID, "fast")
