"""The native training layer beyond its cases: threads, layouts, dropout, CPUs with less, and what `auto` takes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native import in_process

from hstu_cli.kernels import hstu_attention
from hstu_cli.kernels.attention import backward, native
from hstu_cli.kernels.attention.cases import AttentionCase, AttentionInputs, make_inputs
from hstu_cli.kernels.dispatch import choose_impl
from hstu_cli.kernels.native import build

pytestmark = pytest.mark.native
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gradients(inputs: AttentionInputs, impl: str, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Gradients of q, k and v, which are parts of wider rows as the layer has them."""
    rows = torch.stack((inputs.q, inputs.k, inputs.v), dim=1).to(dtype or inputs.q.dtype)
    leaves = [x.detach().requires_grad_() for x in rows.unbind(1)]
    scales = {"alpha": inputs.alpha, "scaling_seqlen": inputs.scaling_seqlen}
    out = hstu_attention(*leaves, inputs.seq_offsets, inputs.num_candidates, **scales, impl=impl)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(torch.autograd.grad(out, leaves, grad_out.to(inputs.q.dtype).to(out.dtype)))


def check(inputs: AttentionInputs, found: list[torch.Tensor]) -> None:
    """Rounding alone: of the operands' products as the reference rounds them in this dtype, and of long sums."""
    exact = gradients(inputs, "reference", torch.float64)
    plain = gradients(inputs, "reference")
    eps = torch.finfo(inputs.q.dtype).eps
    for own, theirs, true in zip(found, plain, exact, strict=True):
        assert own.isfinite().all()
        if true.numel():
            budget = (theirs - true).abs().max() + 2 * eps * true.abs().max()
            assert (own - true).abs().max() <= 2 * budget


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_is_right_and_repeats_itself(threads, num_threads: int, dtype: torch.dtype) -> None:
    # One head: only by sharing the keys do the threads all have work.
    threads(num_threads)
    inputs = make_inputs(AttentionCase((1500, 0, 3), (40, 2, 0), num_heads=1, head_dim=32), dtype)
    found = gradients(inputs, "native")
    check(inputs, found)
    for _ in range(3):
        assert all(torch.equal(one, own) for one, own in zip(gradients(inputs, "native"), found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 3, 31, 33, 64, 128, 160, 256, 300])
def test_any_width_of_a_head(head_dim: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(AttentionCase((270, 1), (3, 2), num_heads=2, head_dim=head_dim), dtype)
    check(inputs, gradients(inputs, "native"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_far_from_zero(dtype: torch.dtype) -> None:
    inputs = make_inputs(AttentionCase((40,), (3,), num_heads=1, head_dim=16), dtype)
    inputs.q.mul_(60)  # scores of several hundred to either side, where exp leaves its range
    check(inputs, gradients(inputs, "native"))


@settings(max_examples=40)
@given(data=st.data())
def test_any_batch(data: st.DataObject) -> None:
    sequence = st.tuples(st.integers(0, 600), st.integers(0, 300))
    sequences = data.draw(st.lists(sequence, min_size=1, max_size=4), "history, candidates")
    case = AttentionCase(
        tuple(history for history, _ in sequences),
        tuple(candidates for _, candidates in sequences),
        num_heads=data.draw(st.sampled_from([1, 2, 5]), "heads"),
        head_dim=data.draw(st.sampled_from([16, 40, 64]), "head_dim"),
    )
    inputs = make_inputs(case, data.draw(st.sampled_from(DTYPES), "dtype"))
    before = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.integers(1, 5), "threads"))
    try:
        found = gradients(inputs, "native")
    finally:
        torch.set_num_threads(before)
    check(inputs, found)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "strided-heads"])
def test_gradients_are_written_where_they_belong_and_nowhere_else(transposed: bool) -> None:
    tokens, heads, width = 300, 3, 40
    shape = (heads, tokens, 4, width) if transposed else (tokens, 4, heads, width)

    def parts(x: torch.Tensor) -> list[torch.Tensor]:
        return [(one.transpose(0, 1) if transposed else one) for one in x.unbind(2 if transposed else 1)]

    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q, k, v, grad_out = parts(rows)
    written = torch.full(shape, torch.nan)
    *grads, rest = parts(written)
    arguments = (q, k, v, grad_out, [0, tokens], [7], 0.3, 50)
    torch.ops.hstu_native.attention_gradients(*arguments, *grads)
    assert rest.isnan().all()
    expected = [torch.empty(tokens, heads, width) for _ in range(3)]
    torch.ops.hstu_native.attention_gradients(*(x.contiguous() for x in arguments[:4]), *arguments[4:], *expected)
    assert all(torch.equal(own, other) for own, other in zip(grads, expected, strict=True))


def test_tensors_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(4, 1, 8)
    fine = (x, x, x, x, [0, 4], [0], 1.0, 1)
    for index, wrong in ((1, x[:3]), (3, x.double()), (4, [0, 5]), (5, [5]), (4, [0])):
        arguments = list(fine)
        arguments[index] = wrong
        with pytest.raises(ValueError, match=r"like|offsets|candidates"):
            torch.ops.hstu_native.attention_gradients(*arguments, *(torch.empty(4, 1, 8) for _ in range(3)))
    grads = (torch.empty(4, 1, 8), torch.empty(8, 1, 4).transpose(0, 2), torch.empty(4, 1, 8))
    with pytest.raises(ValueError, match="must be contiguous"):
        torch.ops.hstu_native.attention_gradients(*fine, *grads)


@pytest.mark.parametrize("width", [1, 15, 33, 1300])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_gradients_of_rows_do_not_depend_on_threads(threads, dtype: torch.dtype, width: int) -> None:
    """Sums over rows too, which SiLU's gradients and those of the norms share; here against float64."""
    generator = torch.Generator().manual_seed(2)
    grad, x = (torch.randn(1000, width, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    found = []
    for num_threads in (1, 2, 5):
        threads(num_threads)
        own = grad.clone()
        found.append((torch.ops.hstu_native.silu_gradients(own, x), own))
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(other, found[0], strict=True))
    sums, own = found[0]
    exact = torch.ops.aten.silu_backward(grad.double(), x.double())
    limits = torch.finfo(dtype)  # below the smallest normal number results lie a fixed step apart
    own_bound = limits.eps * (exact.abs() + limits.smallest_normal)
    assert ((own - exact).abs() <= own_bound + 8 * torch.finfo(torch.float32).eps * grad.double().abs()).all()
    sum_eps = torch.finfo(sums.dtype).eps
    assert ((sums - exact.sum(0)).abs() <= 16 * sum_eps * exact.abs().sum(0)).all()


def test_masks_follow_from_the_seed_and_drop_their_share() -> None:
    from hstu_cli.kernels.fused_layer.native import dropout_mask

    size, share = (401, 300), 0.2
    masks = [dropout_mask(*size, share, seed, torch.device("cpu")) for seed in (7, 7, 8, 7 + 2**32)]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(dropout_mask(401, 130, share, 7, torch.device("cpu")), masks[0][:, :130])
    deviation = (share * (1 - share) / masks[0].numel()) ** 0.5
    for mask in masks:
        assert abs(mask.double().mean().item() - share) < 5 * deviation
    for one, other in itertools.combinations(masks[1:], 2):
        assert abs((one & other).double().mean().item() - share**2) < 5 * deviation  # independent
    rows = masks[0].double()
    assert abs((rows[1:] * rows[:-1]).mean().item() - share**2) < 5 * deviation
    assert abs((rows[:, 1:] * rows[:, :-1]).mean().item() - share**2) < 5 * deviation


def test_the_random_numbers_are_those_of_the_published_generator() -> None:
    """The first call with key and counter 0, whose 16-bit halves decide columns 0 and 1, 32 and 33, and so on."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    for word, number in enumerate(words):
        for half in range(2):
            value = number >> 16 * half & 0xFFFF
            column = 32 * word + half
            kept, dropped = (
                torch.ops.hstu_native.dropout_mask(1, 128, 0, level)[0, column] for level in (value, value + 1)
            )
            assert (bool(kept), bool(dropped)) == (False, True)


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_products_of_any_shape(threads, transposed: tuple[bool, bool]) -> None:
    if not torch.ops.hstu_native.has_bf16_tiles():
        pytest.skip("no bf16 tiles here")
    generator = torch.Generator().manual_seed(4)
    for m, k, n in ((1, 1, 1), (33, 70, 31), (300, 2100, 1100), (64, 0, 5), (257, 31, 64), (600, 64, 33)):
        a, b = (torch.randn(size, generator=generator).bfloat16() for size in ((m, k), (k, n)))
        residual = torch.randn(m, n, generator=generator).bfloat16()
        exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        left, right = (x.T.contiguous() if turned else x for x, turned in zip((a, b), transposed, strict=True))
        for num_threads in (1, 5, 40):  # 40: more than groups of 32 rows
            threads(num_threads)
            found = torch.ops.hstu_native.product(left, right, *transposed, None)
            bound = torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + k * torch.finfo(torch.float32).eps * size
            assert ((found - exact).abs() <= bound).all()
            found = torch.ops.hstu_native.product(left, right, *transposed, residual)
            bound += torch.finfo(torch.bfloat16).eps / 2 * residual.abs()
            assert ((found - exact - residual).abs() <= bound + 1e-30).all()


@pytest.mark.parametrize("isa", ["AVX2", "DEFAULT"])
def test_cpus_with_less(isa: str, tmp_path) -> None:
    """Without bf16 tiles, and (DEFAULT) built for the plainest vectors: a build of its own."""
    code = (
        "import torch, sys; sys.path.insert(0, 'tests')\n"
        "from test_native_training import *\n"
        "from test_fused_layer import BATCHES, Layer\n"
        "assert choose_impl('native', 'cpu').name == 'native'\n"
        "for dtype in DTYPES:\n"
        "    inputs = make_inputs(AttentionCase((270, 1), (3, 2), num_heads=2, head_dim=40), dtype)\n"
        "    check(inputs, gradients(inputs, 'native'))\n"
        "layer = Layer(BATCHES['uneven'], width=24, heads=3, head_dim=40)\n"
        "options = {'dropout': 0.3, 'seed': 11}\n"
        "exact = layer.outcome(torch.float64, mask_of='native', **options)\n"
        "for own, true in zip(layer.outcome(torch.float64, impl='native', **options), exact, strict=True):\n"
        "    torch.testing.assert_close(own, true, rtol=1e-11, atol=1e-12)\n"
        "assert not torch.ops.hstu_native.has_bf16_tiles()\n"
    )
    environment = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    if isa == "DEFAULT":
        environment["ATEN_CPU_CAPABILITY"] = "default"
    done = in_process(code, **environment)
    assert done.returncode == 0, done.stderr


def test_auto_takes_it_where_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_impl("auto", "cpu", gradients=True).name == "native"
    inputs = make_inputs(AttentionCase((5,), (1,), num_heads=1, head_dim=8), torch.float32)
    q = inputs.q.clone().requires_grad_()
    arguments = (q, inputs.k, inputs.v, inputs.seq_offsets, inputs.num_candidates)
    scales = {"alpha": inputs.alpha, "scaling_seqlen": inputs.scaling_seqlen}
    assert hstu_attention(*arguments, **scales).grad_fn.gradients.func is native.attention_gradients
    missing = build.NativeState(False, False, "there is no C++ compiler")
    monkeypatch.setattr(build, "_state", missing)
    choice = choose_impl("auto", "cpu", gradients=True)
    assert (choice.name, choice.reason) == ("blocked", "auto: there is no C++ compiler")
    assert hstu_attention(*arguments, **scales).grad_fn.gradients.func is backward.attention_gradients
