"""What training has in Triton, attention's gradients and the fused layer, against float64."""

import itertools

import pytest
import torch
from support.cli import failure_of, record_of
from support.implementations import TRITON_DEVICE

from hstu_cli.kernels import LayerWeights, fused_hstu_layer, hstu_attention, linear_silu, plan_batch
from hstu_cli.kernels.attention.cases import AttentionCase, AttentionInputs, make_inputs
from hstu_cli.kernels.dispatch import choose_impl
from hstu_cli.kernels.fused_layer import RECOMPUTE, LayerSettings, composition, seeded_dropout
from hstu_cli.kernels.triton.tuning import LaunchConfig, pinned_configs

pytestmark = pytest.mark.triton

DTYPES = (torch.float32, torch.float16)  # the interpreter's products of bfloat16 are wrong
CASES = (
    AttentionCase((), ()),
    AttentionCase((0,), (1,)),
    AttentionCase((1,), (1,), num_heads=1, head_dim=16),
    AttentionCase((0, 0, 7, 0), (3, 0, 0, 0), head_dim=5),
    AttentionCase((33, 0, 17, 1), (5, 20, 0, 2), num_heads=3, head_dim=24),
    AttentionCase((70,), (0,), num_heads=1, head_dim=40),
)
TILES = {
    name: LaunchConfig.of(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4)
    for name, block_m, block_n in (
        ("hstu_attention_query_gradients", 16, 32),
        ("hstu_attention_key_gradients", 32, 16),
    )
}
"""Small tiles, so that short sequences have several of them."""


def attention_gradients(inputs: AttentionInputs, impl: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Gradients of q, k and v for a fixed gradient of the output."""
    device = TRITON_DEVICE if impl == "triton" else "cpu"
    leaves = [x.to(device, dtype).detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    batch = (inputs.seq_offsets, inputs.num_candidates)
    scales = {"alpha": inputs.alpha, "scaling_seqlen": inputs.scaling_seqlen}
    out = hstu_attention(*leaves, *batch, **scales, impl=impl)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(inputs.q.dtype)
    return [grad.cpu() for grad in torch.autograd.grad(out, leaves, grad_out.to(device, dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gradients_of_attention_are_those_of_the_formula(case: AttentionCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    with pinned_configs(TILES):
        found = attention_gradients(inputs, "triton", dtype)
    if not case.num_tokens:
        assert [grad.shape for grad in found] == [inputs.q.shape] * 3
        return
    exact, plain = (attention_gradients(inputs, "reference", d) for d in (torch.float64, dtype))
    for own, theirs, true in zip(found, plain, exact, strict=True):
        rounding = torch.finfo(dtype).eps * true.abs().max()
        assert (own - true).abs().max() <= 2 * ((theirs - true).abs().max() + rounding)


def test_gradients_repeat_and_do_not_depend_on_batch_mates() -> None:
    case = AttentionCase((40, 9), (3, 4), head_dim=16)
    inputs = make_inputs(case, torch.float32)
    together, again = (attention_gradients(inputs, "triton", torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    q, k, v = (x[:43] for x in (inputs.q, inputs.k, inputs.v))
    first = AttentionInputs(
        q, k, v, inputs.seq_offsets[:2], inputs.num_candidates[:1], inputs.alpha, inputs.scaling_seqlen
    )
    alone = attention_gradients(first, "triton", torch.float32)
    assert all(torch.equal(a[:43], b) for a, b in zip(together, alone, strict=True))


def layer_outcome(
    dtype: torch.dtype,
    rounded: torch.dtype,
    impl: str,
    *,
    dropout: float,
    recompute: str = "none",
    width: int = 24,
    by_columns: bool = False,
) -> list[torch.Tensor]:
    """Output and gradients of a small layer over sequences of 19, 0, 1 and 5 tokens, some of them candidates."""
    generator, inner = torch.Generator().manual_seed(2), 2 * 20
    shapes = ((25, width), (width,), (width,), (4 * inner, width), (4 * inner,), (inner,), (inner,), (width, inner))
    device = TRITON_DEVICE if impl == "triton" else "cpu"
    leaves = [
        (torch.randn(shape, generator=generator) * shape[-1] ** -0.5 + (len(shape) == 1))
        .to(rounded)
        .to(device, dtype)
        .requires_grad_()
        for shape in shapes
    ]
    if by_columns:
        leaves[0] = leaves[0].detach().t().contiguous().t().requires_grad_()
    grad_out = torch.randn(25, width, generator=generator).to(rounded).to(device, dtype)
    plan = plan_batch(torch.tensor([0, 19, 19, 20, 25]), torch.tensor([3, 0, 1, 0]), 25, device)
    settings = LayerSettings(2, 0.4, 50, 1e-5, dropout, 2**40 + 7, recompute, dtype)
    x, weights = leaves[0], LayerWeights(*leaves[1:])
    if impl == "triton":
        out = fused_hstu_layer(x, weights, plan, **settings.arguments(), impl=impl)
    else:
        drop = seeded_dropout(settings, "triton", torch.device(TRITON_DEVICE))
        out = composition(x, weights, plan, settings, impl=impl, drop=drop)
    return [tensor.detach().cpu() for tensor in (out, *torch.autograd.grad(out, leaves, grad_out))]


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_layer_and_its_gradients_are_the_formula(dtype: torch.dtype, dropout: float) -> None:
    exact, plain = (layer_outcome(d, dtype, "reference", dropout=dropout) for d in (torch.float64, dtype))
    for own, theirs, true in zip(layer_outcome(dtype, dtype, "triton", dropout=dropout), plain, exact, strict=True):
        assert own.dtype == dtype
        rounding = torch.finfo(dtype).eps * true.abs().max()
        assert (own - true).abs().max() <= 2 * ((theirs - true).abs().max() + rounding)


def test_input_that_lies_by_columns() -> None:
    rows, columns = (
        layer_outcome(torch.float32, torch.float32, "triton", dropout=0.3, by_columns=by_columns)
        for by_columns in (False, True)
    )
    assert all(torch.equal(own, expected) for own, expected in zip(columns, rows, strict=True))


def test_what_is_computed_again_changes_no_bit() -> None:
    kept, *others = (
        layer_outcome(torch.float32, torch.float32, "triton", dropout=0.3, recompute=recompute)
        for recompute in RECOMPUTE
    )
    for found in others:
        assert all(torch.equal(own, expected) for own, expected in zip(found, kept, strict=True))


def test_masks_follow_from_the_seed_and_drop_their_share() -> None:
    from hstu_cli.kernels.fused_layer.triton import dropout_mask

    size, share = (37, 300), 0.2
    masks = [dropout_mask(*size, share, seed, torch.device(TRITON_DEVICE)) for seed in (7, 7, 8, 7 + 2**32)]
    assert torch.equal(masks[0], masks[1])
    deviation = (share * (1 - share) / masks[0].numel()) ** 0.5
    for mask in masks:
        assert abs(mask.double().mean().item() - share) < 5 * deviation
    for one, other in itertools.combinations(masks[1:], 2):
        assert abs((one & other).double().mean().item() - share**2) < 5 * deviation  # independent
    rows = masks[0].double()
    assert abs((rows[1:] * rows[:-1]).mean().item() - share**2) < 5 * deviation
    assert abs((rows[:, 1:] * rows[:, :-1]).mean().item() - share**2) < 5 * deviation


def test_single_operators_have_no_gradients_and_the_layer_says_what_it_takes() -> None:
    assert choose_impl("triton", TRITON_DEVICE, gradients=True).name == "triton"
    x = torch.zeros(2, 3, device=TRITON_DEVICE, requires_grad=True)
    with pytest.raises(ValueError, match="'triton' computes no gradients"):
        linear_silu(x, torch.zeros(4, 3, device=TRITON_DEVICE), torch.zeros(4, device=TRITON_DEVICE), impl="triton")
    with pytest.raises(ValueError, match=r"not in torch\.float64"):
        layer_outcome(torch.float64, torch.float64, "triton", dropout=0.0)
    with pytest.raises(ValueError, match="rows of at most 16384 elements"):
        layer_outcome(torch.float32, torch.float32, "triton", dropout=0.0, width=16_385)


def test_the_benchmark_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOMPUTE_INPUT_LAYERNORM", "0")
    shape = ["--embedding-dim", "16", "--num-heads", "1", "--seqlens", "5", "--batch-size", "1"]
    rounds = ["--num-iters", "1", "--num-iters-warmup", "0"]
    device = ["--device", TRITON_DEVICE, "--impl", "triton", "--dtype", "fp32"]
    rows = record_of("bench-fused", *shape, *rounds, *device)["rows"]
    assert [(row["variant"], row["impl"]) for row in rows] == [
        (variant, "triton") for variant in ("baseline", "optimized", "+silu_recompute")
    ]
    assert all(row["gradient_error"] < 1e-4 for row in rows)
    for wrong, message in ((["--head-dim", "257"], "head dims up to 256"), (["--num-heads", "400"], "rows of up to")):
        assert message in failure_of(2, "bench-fused", *device, "--head-dim", "64", *wrong)
