"""The layer of inference: operator by operator or in one call, over whole sequences and over cached pages."""

import dataclasses

import pytest
import torch
from support.implementations import IMPLEMENTATIONS, device_of
from support.layers import random_weights
from torch.profiler import ProfilerActivity, profile

from hstu_cli.config import MODEL_PRESETS
from hstu_cli.kernels import (
    LayerPages,
    fused_hstu_layer,
    hstu_layer,
    jagged_attention,
    layer_norm,
    layer_norm_mul,
    linear_residual,
    linear_silu,
    paged_attention,
    plan_batch,
    plan_pages,
)
from hstu_cli.kernels.paged_attention.native import flat
from hstu_cli.kvcache.batch import PagedAttention
from hstu_cli.kvcache.storage import PageStorage
from hstu_cli.model.layer import HSTULayer, JaggedAttention

EPS, ALPHA, SCALING_SEQLEN, PAGE_SIZE = 1e-5, 0.3, 50, 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(32, 2, 16), (40, 3, 24), (31, 1, 8), (64, 2, 33)]
"""Width, heads, head dim; the parts of the second, third and fourth cannot all be tiles of their own."""
BATCHES = {
    "empty": ([0], [0], [0]),
    "nothing-cached": ([7, 0, 12], [2, 0, 12], [0, 0, 0]),
    "cached": ([7, 3, 40], [2, 3, 11], [9, 4, 60]),
    "long": ([7, 1300], [2, 88], [9, 130]),
}
"""Of each sequence: new tokens, candidates among them, cached tokens."""

every_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


class Inputs:
    """A layer's input and weights over a batch, and pages that only `wait` fills."""

    def __init__(self, batch: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu") -> None:
        new, candidates, cached = BATCHES[batch]
        width, self.heads, head_dim = shape
        inner, generator = self.heads * head_dim, torch.Generator().manual_seed(5)

        def normal(*sizes: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
            return (torch.randn(*sizes, generator=generator) * std + mean).to(dtype).to(device)

        self.x = normal(sum(new), width, mean=0.3)
        self.weights = random_weights(normal, width, inner)
        offsets = torch.tensor([0, *new]).cumsum(0)
        self.plan = plan_batch(offsets, torch.tensor(candidates), sum(new), device)
        held = [-(-(c + n) // PAGE_SIZE) for c, n in zip(cached, new, strict=True)]
        ids = torch.randperm(sum(held) + 2, generator=generator)[: sum(held)]
        self.page_plan = plan_pages(
            torch.tensor([0, *held]).cumsum(0),
            ids,
            torch.tensor(cached),
            num_sequences=len(new),
            num_pages=sum(held) + 2,
            page_size=PAGE_SIZE,
            device=device,
        )
        self.full = normal(sum(held) + 2, 2, PAGE_SIZE, self.heads, head_dim)
        rows, slots = [], []
        for b, (start, c) in enumerate(zip(offsets.tolist(), cached, strict=False)):  # history is stored
            pages = ids[sum(held[:b]) : sum(held[: b + 1])].tolist()
            for i in range(new[b] - candidates[b]):
                rows.append(start + i)
                slots.append(pages[(c + i) // PAGE_SIZE] * PAGE_SIZE + (c + i) % PAGE_SIZE)
        self.rows, self.slots = (torch.tensor(part, dtype=torch.int64, device=device) for part in (rows, slots))

    def cached(self, append_impl: str = "torch") -> LayerPages:
        """What is cached, with pages that are not there yet."""
        pages = torch.full_like(self.full, torch.nan)

        def arrive() -> None:
            pages.copy_(self.full)

        return LayerPages(pages, self.page_plan, self.rows, self.slots, append_impl, arrive)

    def layer(self, cached: LayerPages | None, impl: str, **changes: object) -> torch.Tensor:
        """The operator."""
        settings = {"num_heads": self.heads, "alpha": ALPHA, "scaling_seqlen": SCALING_SEQLEN, "eps": EPS} | changes
        with torch.no_grad():
            return hstu_layer(self.x, self.weights, self.plan, cached, impl=impl, **settings)

    @torch.no_grad()
    def by_operators(self, cached: LayerPages | None, impl: str) -> torch.Tensor:
        """The same by the smallest operators."""
        w = self.weights
        normed = layer_norm(self.x, w.input_norm_weight, w.input_norm_bias, eps=EPS, impl=impl)
        uvqk = linear_silu(normed, w.uvqk_weight, w.uvqk_bias, impl=impl)
        u, *vqk = uvqk.chunk(4, dim=1)
        v, q, k = (part.reshape(len(part), self.heads, part.shape[1] // self.heads) for part in vqk)
        scales = {"alpha": ALPHA, "scaling_seqlen": SCALING_SEQLEN, "impl": impl}
        if cached is None:
            o = jagged_attention(q, k, v, self.plan, **scales)
        else:
            cached.store(k, v)
            o = paged_attention(q, k, v, self.plan, cached.pages, cached.plan, **scales)
        gated = layer_norm_mul(o.flatten(1), u, w.output_norm_weight, w.output_norm_bias, eps=EPS, impl=impl)
        return linear_residual(gated, w.output_weight, self.x, impl=impl)


@every_implementation
@every_dtype
@every_shape
@pytest.mark.parametrize("batch", BATCHES)
def test_it_is_its_operators_bit_for_bit(batch: str, shape, dtype: torch.dtype, impl: str) -> None:
    if impl == "triton" and device_of(impl) == "cpu" and (dtype == torch.bfloat16 or batch == "long"):
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly, and long batches for minutes")
    inputs = Inputs(batch, shape, dtype, device_of(impl))
    append_impl = "native" if impl == "native" else "torch"
    for found_in, expected_in in ((None, None), (inputs.cached(append_impl), inputs.cached())):
        found, expected = inputs.layer(found_in, impl), inputs.by_operators(expected_in, impl)
        assert found.dtype == dtype
        assert found.isfinite().all()
        assert torch.equal(found, expected)
        if found_in is not None and len(inputs.rows):
            assert torch.equal(found_in.pages, expected_in.pages)
            assert not torch.equal(found_in.pages, inputs.full)


@pytest.mark.native
def test_in_tiles_it_is_one_call() -> None:
    inputs = Inputs("cached", SHAPES[0], torch.bfloat16)
    if not torch.ops.hstu_native.has_bf16_tiles():
        pytest.skip("the C++ operators have no bf16 tiles on this CPU")
    for cached in (None, inputs.cached("native")):
        with profile(activities=[ProfilerActivity.CPU]) as found:
            inputs.layer(cached, "auto")
        own = [event.key for event in found.key_averages() if event.key.startswith("hstu_native::")]
        assert set(own) == {"hstu_native::layer", "hstu_native::pack_weight", "hstu_native::has_bf16_tiles"} - (
            {"hstu_native::pack_weight"} if cached else set()
        )


@pytest.mark.native
@pytest.mark.parametrize("append_impl", ["torch", "native"])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_any_number_of_threads_and_any_append_give_the_same(threads, num_threads: int, append_impl: str) -> None:
    inputs = Inputs("cached", (96, 3, 32), torch.bfloat16)
    expected_in, found_in = inputs.cached(), inputs.cached(append_impl)
    expected = inputs.by_operators(expected_in, "native")
    threads(num_threads)
    found = inputs.layer(found_in, "native")
    assert torch.equal(found_in.pages, expected_in.pages)
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)


@every_implementation
def test_what_does_not_fit_is_refused(impl: str) -> None:
    inputs = Inputs("cached", SHAPES[0], torch.bfloat16, device_of(impl))
    other = Inputs("nothing-cached", SHAPES[0], torch.bfloat16, device_of(impl))
    w = inputs.weights
    with pytest.raises(ValueError, match=r"scaling_seqlen must be at least 1"):
        inputs.layer(None, impl, scaling_seqlen=0)
    x, inputs.x = inputs.x, other.x
    with pytest.raises(ValueError, match=r"planned for 50 tokens"):
        inputs.layer(None, impl)
    inputs.x = x[0]
    with pytest.raises(ValueError, match=r"x must be \[tokens, width\]"):
        inputs.layer(None, impl)
    inputs.x = x
    for num_heads in (0, -1, 3):
        with pytest.raises(ValueError, match=rf"output_norm_weight must be one row for {num_heads} equal heads"):
            inputs.layer(None, impl, num_heads=num_heads)
    cached = inputs.cached("native" if impl == "native" else "torch")
    for change, message in (
        ({"plan": other.page_plan}, r"page tables were planned for 3 sequences"),
        ({"pages": inputs.full.float()}, r"pages must be torch.bfloat16"),
        ({"pages": inputs.full[0]}, r"pages must be \[num_pages, 2, page_size, 2, 16\]"),
        ({"pages": inputs.full.to("meta")}, r"pages must be torch.bfloat16 on .* not torch.bfloat16 on meta"),
        ({"new_slots": inputs.slots[1:]}, r"rows and slots must be as many int64"),
        ({"new_rows": inputs.rows.to("meta")}, r"rows and slots must be on"),
    ):
        with pytest.raises(ValueError, match=message):
            inputs.layer(dataclasses.replace(cached, **change), impl)
    assert cached.pages.isnan().all(), "nothing was stored"
    for changed in (
        {"output_weight": w.output_weight[:-1]},
        {"uvqk_bias": w.uvqk_bias[1:]},
        {"input_norm_weight": w.input_norm_weight.float()},
        {"output_norm_bias": w.output_norm_bias[1:]},
    ):
        inputs.weights = w._replace(**changed)
        with pytest.raises(
            ValueError, match="weights must be" if "input_norm_weight" in changed else next(iter(changed))
        ):
            inputs.layer(None, impl)


@every_implementation
def test_batches_without_history_store_nothing_and_plans_of_pages_may_change(impl: str) -> None:
    """As further candidates of the same requests do."""
    dtype = torch.float32 if impl == "triton" else torch.bfloat16
    inputs, nothing = Inputs("cached", SHAPES[0], dtype, device_of(impl)), torch.empty(0, dtype=torch.int64)
    nothing = nothing.to(inputs.rows.device)
    fewer = dataclasses.replace(inputs.page_plan, cached_lengths=inputs.page_plan.cached_lengths - 1)
    fewer = dataclasses.replace(fewer, lengths=[length - 1 for length in inputs.page_plan.lengths])
    found = []
    for plan in (inputs.page_plan, fewer, inputs.page_plan):
        cached = dataclasses.replace(inputs.cached(), plan=plan, new_rows=nothing, new_slots=nothing)
        expected = dataclasses.replace(inputs.cached(), plan=plan, new_rows=nothing, new_slots=nothing)
        found.append(inputs.layer(cached, impl))
        assert torch.equal(found[-1], inputs.by_operators(expected, impl))
        assert torch.equal(cached.pages, inputs.full)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_over_cached_pages_there_are_no_gradients_and_nothing_is_dropped() -> None:
    inputs = Inputs("cached", SHAPES[0], torch.float32)
    inputs.x.requires_grad_()
    with pytest.raises(ValueError, match=r"no gradients over cached pages"):
        hstu_layer(
            inputs.x, inputs.weights, inputs.plan, inputs.cached(), num_heads=2, alpha=1.0, scaling_seqlen=1, eps=EPS
        )
    config = dataclasses.replace(MODEL_PRESETS["tiny"], num_layers=1)
    layer = HSTULayer(config).train()
    layer.dropout = 0.5
    storage = PageStorage(inputs.full[None])
    attention = PagedAttention(config, storage, [], inputs.plan, inputs.page_plan, inputs.rows, inputs.slots, "blocked")
    with pytest.raises(ValueError, match=r"call eval\(\)"), torch.no_grad():
        layer(torch.randn(50, config.hidden_dim), attention, 0)


@pytest.mark.native
def test_the_call_itself_refuses_what_does_not_fit() -> None:
    """Whoever calls the C++ operator without the checks in Python."""
    inputs = Inputs("cached", SHAPES[0], torch.bfloat16)
    if not torch.ops.hstu_native.has_bf16_tiles():
        pytest.skip("the C++ operators have no bf16 tiles on this CPU")
    w, pages = inputs.weights, inputs.full.clone()
    packed = [torch.ops.hstu_native.pack_weight(weight) for weight in (w.uvqk_weight, w.output_weight)]
    tables, lengths = inputs.page_plan.on_host()
    offsets, candidates = inputs.plan.on_host()
    names = (
        "x", "a", "b", "uvqk", "bias", "c", "d", "output", "eps", "heads", "offsets", "candidates", "pages", "rows",
        "slots", "indptr", "ids", "lengths", "alpha", "scaling",
    )  # fmt: skip
    right = dict(
        zip(
            names,
            (
                inputs.x, w[0], w[1], packed[0], w[3], w[4], w[5], packed[1], EPS, inputs.heads, offsets, candidates,
                pages, inputs.rows, inputs.slots, *flat(tables), lengths, ALPHA, SCALING_SEQLEN,
            ),
            strict=True,
        )
    )  # fmt: skip

    def call(**changes: object) -> torch.Tensor:
        return torch.ops.hstu_native.layer(*(right | changes).values())

    for message, changes in (
        ("offsets", {"x": inputs.x[:0]}),
        ("heads", {"heads": 0}),
        ("heads", {"heads": 3}),
        ("heads", {"bias": w[3][1:]}),
        ("packed", {"uvqk": packed[0][:1].expand(len(packed[0]))}),
        ("come together", {"slots": None}),
        ("come together", {"pages": None}),
        ("come together", {"pages": None, "indptr": [], "ids": [], "lengths": []}),
        ("pages must be", {"pages": pages[0]}),
        ("do not fit", {"candidates": [0] * 5000, "lengths": [0] * 5000}),
        ("too few pages", {"lengths": [99, 4, 60]}),
        ("no page -1", {"ids": [-1, *flat(tables)[1][1:]]}),
        ("no row", {"rows": inputs.rows + 50}),
        ("no slot", {"slots": inputs.slots + 4000}),
    ):
        with pytest.raises(ValueError, match=message):
            call(**changes)
    assert torch.equal(pages, inputs.full), "nothing was stored"
    assert call().isfinite().all()
    assert not torch.equal(pages, inputs.full)
    nothing = plan_batch(torch.tensor([0, 0]), None, 0, "cpu").on_host()
    uncached = {"pages": None, "rows": None, "slots": None, "indptr": [], "ids": [], "lengths": []}
    empty = {"x": inputs.x[:0], "offsets": nothing[0], "candidates": nothing[1]}
    assert call(**uncached, **empty).shape == (0, SHAPES[0][0])


def test_a_layer_of_the_model_drops_in_training_even_without_gradients() -> None:
    config = dataclasses.replace(MODEL_PRESETS["tiny"], num_layers=1)
    torch.manual_seed(0)
    layer, x = HSTULayer(config).train(), torch.randn(9, config.hidden_dim)
    plan = plan_batch(torch.tensor([0, 9]), None, 9, "cpu")
    attention = JaggedAttention(config, plan, impl="reference")
    with torch.no_grad():
        whole = layer(x, attention, 0)
        layer.dropout = 0.5
        torch.manual_seed(1)
        found = layer(x, attention, 0)
        torch.manual_seed(1)
        seed = int(torch.randint(2**63 - 1, ()))
        scales = {"alpha": config.alpha, "scaling_seqlen": config.scaling_seqlen, "eps": config.norm_eps}
        expected = fused_hstu_layer(
            x, layer.weights, plan, num_heads=config.num_heads, **scales, dropout=0.5, seed=seed, impl="reference"
        )
        assert torch.equal(found, expected)
        assert not torch.equal(found, whole)
        assert torch.equal(layer.eval()(x, attention, 0), whole)
