"""The fused training layer: output, gradients and what it keeps, against the formulas in float64."""

import pytest
import torch
from support.layers import random_weights

from hstu_cli.bench.memory import MemoryTimeline
from hstu_cli.config import ModelConfig
from hstu_cli.kernels import BatchPlan, LayerWeights, fused_hstu_layer, plan_batch
from hstu_cli.kernels.attention import blocked
from hstu_cli.kernels.fused_layer import RECOMPUTE, LayerSettings, composition, dropout, seeded_dropout
from hstu_cli.model.cost import kept_bytes
from hstu_cli.model.layer import HSTULayer, JaggedAttention

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NARROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCHES = {
    "empty": ((0,), (0,)),
    "one": ((1,), (0,)),
    "with-empty-sequences": ((5, 0, 9, 1, 0), (2, 0, 9, 1, 0)),
    "uneven": ((41, 1, 300, 7), (5, 0, 2, 7)),
    "longer-than-a-block": ((700, 3), (100, 1)),
}
"""Tokens of each sequence, and how many of them are candidates."""

every_batch = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
every_implementation = pytest.mark.parametrize("impl", ["blocked", pytest.param("native", marks=pytest.mark.native)])
every_recompute = pytest.mark.parametrize("recompute", RECOMPUTE)


class Layer:
    """A layer with random weights over a batch; width D, H heads of d."""

    def __init__(self, batch: tuple[tuple[int, ...], tuple[int, ...]], width: int, heads: int, head_dim: int) -> None:
        lengths, candidates = batch
        inner, self.heads = heads * head_dim, heads
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean

        self.plan: BatchPlan = plan_batch(
            torch.tensor([0, *lengths]).cumsum(0), torch.tensor(candidates), sum(lengths), "cpu"
        )
        self.tensors = (
            normal(sum(lengths), width, mean=0.3),
            *random_weights(normal, width, inner),
        )
        self.grad_out = normal(sum(lengths), width)

    def outcome(
        self,
        dtype: torch.dtype,
        *,
        rounded: torch.dtype | None = None,
        activations: torch.dtype | None = None,
        **options,
    ) -> list[torch.Tensor]:
        """Output and gradients of x and all weights in a dtype, on inputs that are rounded to another first."""
        leaves = [tensor.to(rounded or dtype).to(dtype).requires_grad_() for tensor in self.tensors]
        grad_out = self.grad_out.to(rounded or dtype).to(dtype)
        out = self(leaves[0], LayerWeights(*leaves[1:]), dtype=activations, **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]

    def __call__(self, x: torch.Tensor, weights: LayerWeights, *, mask_of: str = "", **options) -> torch.Tensor:
        """The layer, or the formula with the dropout mask of an implementation."""
        scales = {"alpha": 0.4, "scaling_seqlen": 50, "eps": 1e-5}
        if mask_of:
            share, seed = options.get("dropout", 0.0), options.get("seed", 0)
            settings = LayerSettings(self.heads, *scales.values(), share, seed, "none", x.dtype)
            drop = seeded_dropout(settings, mask_of)
            return composition(x, weights, self.plan, settings, impl="reference", drop=drop)
        return fused_hstu_layer(x, weights, self.plan, num_heads=self.heads, **scales, **options)


@every_implementation
@every_recompute
@pytest.mark.parametrize("share", [0.0, 0.3], ids=["", "dropout"])
@every_batch
def test_it_is_the_formula_with_its_gradients(batch, share: float, recompute: str, impl: str) -> None:
    layer = Layer(batch, width=24, heads=3, head_dim=5)
    options = {"dropout": share, "seed": 11}
    exact = layer.outcome(torch.float64, mask_of=impl, **options)
    found = layer.outcome(torch.float64, recompute=recompute, impl=impl, **options)
    for own, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-11, atol=1e-12)


@every_implementation
@every_recompute
def test_it_passes_gradcheck(recompute: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK_ROWS", 3)  # sequences longer and shorter than a block
    layer = Layer(((6, 0, 2, 1), (2, 0, 0, 1)), width=4, heads=2, head_dim=2)
    leaves = [tensor.clone().requires_grad_() for tensor in layer.tensors]

    def run(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return layer(x, LayerWeights(*weights), dropout=0.4, seed=5, recompute=recompute, impl=impl)

    assert torch.autograd.gradcheck(run, leaves)


@every_implementation
@pytest.mark.parametrize("dtype", NARROW_DTYPES, ids=str)
@every_batch
def test_rounding_errors_are_no_larger_than_the_compositions(batch, dtype: torch.dtype, impl: str) -> None:
    layer = Layer(batch, width=24, heads=3, head_dim=40)
    options = {"dropout": 0.3, "seed": 11}
    exact = layer.outcome(torch.float64, rounded=dtype, mask_of=impl, **options)
    plain = layer.outcome(dtype, mask_of=impl, **options)
    for own, theirs, true in zip(layer.outcome(dtype, impl=impl, **options), plain, exact, strict=True):
        assert own.dtype == dtype
        if true.numel():
            rounding = torch.finfo(dtype).eps * true.abs().max()
            assert (own - true).abs().max() <= 2 * ((theirs - true).abs().max() + rounding)


@every_implementation
@pytest.mark.parametrize("dtype", NARROW_DTYPES, ids=str)
def test_what_is_computed_again_changes_no_bit(dtype: torch.dtype, impl: str) -> None:
    layer = Layer(BATCHES["uneven"], width=24, heads=3, head_dim=16)
    options = {"dropout": 0.2, "seed": 1, "impl": impl}
    kept, *others = (layer.outcome(dtype, recompute=recompute, **options) for recompute in RECOMPUTE)
    for found in others:
        assert all(torch.equal(own, expected) for own, expected in zip(found, kept, strict=True))


@every_implementation
def test_narrow_activations_train_wide_weights(impl: str) -> None:
    """As in training: x and weights float32, activations bfloat16."""
    layer = Layer(BATCHES["uneven"], width=24, heads=3, head_dim=16)
    exact = layer.outcome(torch.float64, rounded=torch.float32, impl="reference")
    narrow = layer.outcome(torch.bfloat16, impl="reference")
    found = layer.outcome(torch.float32, activations=torch.bfloat16, impl=impl)
    for own, theirs, true in zip(found, narrow, exact, strict=True):
        assert own.dtype == torch.float32
        rounding = torch.finfo(torch.bfloat16).eps * true.abs().max()
        assert 0 < (own - true).abs().max() <= 2 * ((theirs - true).abs().max() + rounding)


def test_masks_follow_from_the_seed_and_drop_their_share() -> None:
    size, share = (1001, 97), 0.2
    mask, same, other = (dropout.dropout_mask(*size, share, seed, torch.device("cpu")) for seed in (7, 7, 8))
    assert torch.equal(mask, same)
    assert not torch.equal(mask, other)
    deviation = (share * (1 - share) / mask.numel()) ** 0.5
    for one in (mask, other):
        assert abs(one.double().mean().item() - share) < 5 * deviation
    assert abs((mask & other).double().mean().item() - share**2) < 5 * deviation  # independent
    assert dropout.dropout_scale(share) == pytest.approx(1 / (1 - share), rel=1e-4)


@pytest.mark.parametrize(("share", "dropped"), [(0.0, 0.0), (1e-9, 0.0), (0.5, 0.5), (1 - 1e-9, 1 - 2**-16)])
def test_shares_at_the_ends(share: float, dropped: float) -> None:
    assert 1 - 1 / dropout.dropout_scale(share) == pytest.approx(dropped, abs=1e-12)
    mask = dropout.dropout_mask(300, 101, share, 0, torch.device("cpu"))
    assert mask.double().mean().item() == pytest.approx(dropped, abs=0.02)
    assert bool(mask.any()) == (dropped > 0)


CONFIG = ModelConfig(
    num_layers=1, hidden_dim=48, num_heads=2, head_dim=20, max_history=4, max_candidates=1,
    position_buckets=8, scaling_seqlen=9, head_dims=(8,),
)  # fmt: skip


@every_implementation
@pytest.mark.parametrize("share", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_is_what_is_documented(dtype: torch.dtype, share: float, impl: str) -> None:
    layer = Layer(((130, 7), (0, 0)), CONFIG.hidden_dim, CONFIG.num_heads, CONFIG.head_dim)
    leaves = [tensor.to(dtype).requires_grad_() for tensor in layer.tensors]
    x, weights = leaves[0], LayerWeights(*leaves[1:])
    ends = len(x) * CONFIG.hidden_dim * dtype.itemsize  # the output is there besides; the input was there before
    for recompute in RECOMPUTE:
        with MemoryTimeline() as timeline:
            out = layer(x, weights, dropout=share, recompute=recompute, impl=impl)
        kept = kept_bytes(CONFIG, len(x), dtype.itemsize, recompute, dropout=share > 0)
        assert timeline.live_bytes == kept - ends + out.nbytes
    settings = LayerSettings(CONFIG.num_heads, 0.4, 50, 1e-5, share, 0, "none", dtype)

    def drop(gated: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(gated, share) if share else gated

    with MemoryTimeline() as timeline:
        out = composition(x, weights, layer.plan, settings, impl=impl, drop=drop)
    assert timeline.live_bytes == kept_bytes(CONFIG, len(x), dtype.itemsize, "baseline", dropout=share > 0) - ends + (
        out.nbytes
    )


@every_implementation
def test_scores_are_never_whole(impl: str) -> None:
    """A strip of them is alive at a time."""
    tokens, heads = 4096, 1
    layer = Layer(((tokens,), (0,)), width=8, heads=heads, head_dim=8)
    leaves = [tensor.float().requires_grad_() for tensor in layer.tensors]
    with MemoryTimeline() as timeline:
        layer(leaves[0], LayerWeights(*leaves[1:]), impl=impl).backward(layer.grad_out.float())
    assert timeline.peak_bytes < tokens * tokens * 4


def test_a_layer_of_the_model_takes_it_and_follows_autocast_and_the_generator() -> None:
    module = HSTULayer(CONFIG).train()
    module.dropout, module.recompute = 0.4, "layernorm"
    x = torch.randn(11, CONFIG.hidden_dim)
    plan = plan_batch(torch.tensor([0, 4, 11]), None, 11, "cpu")
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(module(x, JaggedAttention(CONFIG, plan), 0))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert type(found[0].grad_fn).__name__ == "FusedLayerBackward"
    torch.manual_seed(1)
    own = fused_hstu_layer(
        x,
        module.weights,
        plan,
        num_heads=2,
        alpha=CONFIG.alpha,
        scaling_seqlen=9,
        eps=1e-5,
        dropout=0.4,
        seed=int(torch.randint(2**63 - 1, ())),
        dtype=torch.bfloat16,
    )
    assert torch.equal(found[0], own)
    with torch.no_grad():
        plain = module.eval()(x, JaggedAttention(CONFIG, plan), 0)
    assert plain.grad_fn is None
    torch.testing.assert_close(module(x, JaggedAttention(CONFIG, plan), 0).detach(), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recompute": "all"}, "recompute must be one of none"),
        ({"dropout": 1.0}, "dropout must be from 0 to below 1, not 1.0"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"impl": "ascend"}, "runs on an NPU"),
        ({"impl": "reference", "recompute": "silu"}, "recomputes nothing"),
        ({"impl": "reference", "dtype": torch.bfloat16}, "recomputes nothing"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(change: dict, message: str) -> None:
    layer = Layer(BATCHES["one"], width=4, heads=1, head_dim=2)
    with pytest.raises(ValueError, match=message):
        layer(layer.tensors[0], LayerWeights(*layer.tensors[1:]), **change)


def test_shapes_that_do_not_fit() -> None:
    layer = Layer(BATCHES["uneven"], width=4, heads=3, head_dim=2)
    x, weights = layer.tensors[0], LayerWeights(*layer.tensors[1:])
    for wrong, message in (
        (x[:-1], "planned for 349 tokens"),
        (x[0], "x must be"),
        (x.int(), "floating dtype"),
        (x[:, :3], "input_norm_weight must be"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(wrong, weights)
    with pytest.raises(ValueError, match="uvqk_bias must be"):
        layer(x, weights._replace(uvqk_bias=weights.uvqk_bias[1:]))
    with pytest.raises(ValueError, match="3 equal heads"):
        layer(x, weights._replace(output_norm_weight=weights.output_norm_weight[1:]))
