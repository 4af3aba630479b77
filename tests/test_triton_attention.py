"""Attention and appending in Triton: every way to launch them, padded batches, pages of every size, what is refused."""

import dataclasses
import functools

import pytest
import torch
from support.implementations import TRITON_DEVICE
from support.triton_attention import INTERPRETED
from test_attention import oracle
from test_paged_attention import oracle as paged_oracle

from hstu_cli.errors import UnavailableError, UsageError
from hstu_cli.kernels import (
    BatchPlan,
    PagePlan,
    append_to_pages,
    hstu_attention,
    jagged_attention,
    paged_attention,
    plan_batch,
    plan_pages,
)
from hstu_cli.kernels import dispatch as dispatch_module
from hstu_cli.kernels.attention.cases import AttentionCase, AttentionInputs, make_inputs
from hstu_cli.kernels.dispatch import choose_impl, choose_impl_for
from hstu_cli.kernels.paged_attention.cases import PagedCase, PagedInputs, make_paged_inputs
from hstu_cli.kernels.triton.chips import CHIPS
from hstu_cli.kernels.triton.state import TritonState
from hstu_cli.kernels.triton.tuning import LaunchConfig, pinned_configs

pytestmark = pytest.mark.triton

DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def blocks(m: int, n: int) -> LaunchConfig:
    return LaunchConfig.of(BLOCK_M=m, BLOCK_N=n, num_warps=4, num_stages=2)


SHAPES = (blocks(16, 16), blocks(32, 128), blocks(128, 32), dataclasses.replace(blocks(64, 64), max_registers=128))
"""Square and not, of rows and keys."""

every_shape = pytest.mark.parametrize("config", SHAPES, ids=lambda config: config.label)


@pytest.fixture
def many_processors(monkeypatch: pytest.MonkeyPatch):
    """A device so wide that the keys of every row are split as far as they can be."""
    from hstu_cli.kernels.attention import triton

    monkeypatch.setattr(triton, "SPLIT_BLOCKS", 1)
    monkeypatch.setattr(triton._Call, "num_splits", functools.partialmethod(_most_splits, triton._Call.num_splits))


def _most_splits(call, right, config: LaunchConfig) -> int:
    return right(dataclasses.replace(call, num_multiprocessors=10_000), config)


def plans(inputs: PagedInputs) -> tuple[BatchPlan, PagePlan]:
    new, pages = inputs.new, inputs.pages
    plan = plan_batch(new.seq_offsets, new.num_candidates, len(new.q), TRITON_DEVICE)
    page_plan = plan_pages(
        inputs.page_indptr, inputs.page_ids, inputs.cached_lengths,
        num_sequences=plan.num_sequences, num_pages=len(pages), page_size=pages.shape[2], device=TRITON_DEVICE,
    )  # fmt: skip
    return plan, page_plan


def run(inputs: AttentionInputs, plan: BatchPlan | None = None) -> torch.Tensor:
    plan = plan or plan_batch(inputs.seq_offsets, inputs.num_candidates, len(inputs.q), TRITON_DEVICE)
    q, k, v = (x.to(TRITON_DEVICE) for x in (inputs.q, inputs.k, inputs.v))
    scales = {"alpha": inputs.alpha, "scaling_seqlen": inputs.scaling_seqlen}
    return jagged_attention(q, k, v, plan, **scales, impl="triton").cpu()


def run_paged(inputs: PagedInputs, both: tuple[BatchPlan, PagePlan] | None = None) -> torch.Tensor:
    plan, page_plan = both or plans(inputs)
    q, k, v, pages = (x.to(TRITON_DEVICE) for x in (inputs.new.q, inputs.new.k, inputs.new.v, inputs.pages))
    scales = {"alpha": inputs.new.alpha, "scaling_seqlen": inputs.new.scaling_seqlen}
    return paged_attention(q, k, v, plan, pages, page_plan, **scales, impl="triton").cpu()


def assert_right(inputs: AttentionInputs, output: torch.Tensor) -> None:
    expected, bound = oracle(inputs)
    assert ((output.double() - expected).abs() <= bound).all()


def assert_paged_right(inputs: PagedInputs, output: torch.Tensor) -> None:
    """The error may be twice that of the formula in the same dtype, and rounding."""
    whole = inputs.whole
    plain = hstu_attention(
        whole.q, whole.k, whole.v, whole.seq_offsets, whole.num_candidates,
        alpha=whole.alpha, scaling_seqlen=whole.scaling_seqlen, impl="reference",
    )[inputs.new_rows]  # fmt: skip
    expected = paged_oracle(inputs)
    budget = 2 * ((plain.double() - expected).norm() + torch.finfo(plain.dtype).eps * expected.norm())
    assert (output.double() - expected).norm() <= budget


UNEVEN = AttentionCase((130, 0, 1, 75, 31), (33, 2, 0, 0, 70), num_heads=2, head_dim=40)
PAGED_UNEVEN = PagedCase(
    AttentionCase((150, 9, 1, 64, 0), (33, 2, 0, 70, 5), num_heads=2, head_dim=32), (129, 9, 0, 63, 0), 16
)


@every_dtype
@every_shape
def test_every_shape_of_blocks(config: LaunchConfig, dtype: torch.dtype) -> None:
    inputs = make_inputs(UNEVEN, dtype)
    with pinned_configs({"hstu_attention": config}):
        assert_right(inputs, run(inputs))


@every_dtype
@pytest.mark.parametrize("config", SHAPES[1:3], ids=lambda config: config.label)
@pytest.mark.usefixtures("many_processors")
def test_split_keys(config: LaunchConfig, dtype: torch.dtype) -> None:
    inputs, paged = make_inputs(UNEVEN, dtype), make_paged_inputs(PAGED_UNEVEN, dtype)
    with pinned_configs({"hstu_attention": config, "hstu_paged_attention": config}):
        assert_right(inputs, run(inputs))
        assert_paged_right(paged, run_paged(paged))


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize("head_dim", [1, 20, 100, 200, 256])
def test_any_head_dim_up_to_the_largest(head_dim: int) -> None:
    inputs = make_inputs(AttentionCase((50, 3), (4, 0), num_heads=1, head_dim=head_dim), torch.float32)
    with pinned_configs({"hstu_attention": blocks(32, 32)}):
        assert_right(inputs, run(inputs))


@every_dtype
@pytest.mark.parametrize("page_size", [1, 5, 16, 32, 64, 128, 256])
def test_every_page_size(page_size: int, dtype: torch.dtype) -> None:
    inputs = make_paged_inputs(dataclasses.replace(PAGED_UNEVEN, page_size=page_size), dtype)
    for config in (blocks(32, 64), blocks(64, 16)):
        with pinned_configs({"hstu_paged_attention": config}):
            assert_paged_right(inputs, run_paged(inputs))


@pytest.mark.parametrize("num_sequences", [2, 3, 32, 33, 70])
def test_sequences_are_found_in_large_batches(num_sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one short look at the offsets, or in several of 32."""
    from hstu_cli.kernels.attention import triton

    monkeypatch.setattr(triton, "SMALL_BATCH", 2)
    generator = torch.Generator().manual_seed(num_sequences)
    history, candidates = torch.randint(0, 4, (2, num_sequences), generator=generator).tolist()
    case = AttentionCase(tuple(history), tuple(candidates), num_heads=1, head_dim=16)
    inputs = make_inputs(case, torch.float32)
    with pinned_configs({"hstu_attention": blocks(16, 16)}):
        assert_right(inputs, run(inputs))


def padded(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    """With rows of NaN behind its own."""
    return torch.cat([tensor, tensor.new_full((num_rows, *tensor.shape[1:]), torch.nan)])


@pytest.mark.usefixtures("many_processors")
@pytest.mark.filterwarnings("ignore:.* encountered in add")  # of sums of rows that belong to no sequence
def test_a_launch_for_bounds_serves_what_is_smaller() -> None:
    """What a captured graph replays: no host numbers, empty sequences at the end, rows that belong to none."""
    paged = make_paged_inputs(PAGED_UNEVEN, torch.float32)
    new = paged.new
    plan, page_plan = plans(paged)
    tables = (plan.seq_offsets, plan.num_candidates, page_plan.page_indptr, page_plan.cached_lengths)
    offsets, candidates, indptr, cached = (torch.cat([t, t[-1:].expand(3)]) for t in tables)
    candidates[-3:] = cached[-3:] = 0
    plan = BatchPlan(offsets, candidates, len(new.q) + 50, 400, None, None)
    ids = torch.cat([page_plan.page_ids, page_plan.page_ids.new_full((9,), 10**6)])
    page_plan = dataclasses.replace(
        page_plan, page_indptr=indptr, page_ids=ids, cached_lengths=cached, max_cached_tokens=900, tables=None
    )
    wide = dataclasses.replace(new, **{name: padded(getattr(new, name), 50) for name in ("q", "k", "v")})
    config = blocks(64, 32)
    with pinned_configs({"hstu_attention": config, "hstu_paged_attention": config}):
        output = run_paged(dataclasses.replace(paged, new=wide), (plan, page_plan))
        assert_paged_right(paged, output[: len(new.q)])
        output = run(wide, plan)
        assert_right(new, output[: len(new.q)])


def test_strides_beyond_32_bits() -> None:
    """Rows 2^31 elements apart and more: of memory that is reserved alone."""
    inputs = make_inputs(AttentionCase((4,), (2,), num_heads=2, head_dim=16), torch.float16)
    views = {}
    for name, (token, head) in {"q": (1 << 29, 32), "k": (32, 1 << 31), "v": (1 << 29, 64)}.items():
        storage = torch.UntypedStorage(2 * (5 * token + head + 16))
        views[name] = torch.empty(0, dtype=torch.float16).set_(storage, 0, (6, 2, 16), (token, head, 1))
        views[name].copy_(getattr(inputs, name))
    output = run(dataclasses.replace(inputs, **views))
    assert_right(inputs, output)


@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_append_writes_the_slots_and_no_other(page_size: int) -> None:
    generator = torch.Generator().manual_seed(page_size)
    pages = torch.randn(6, 2, page_size, 3, 20, generator=generator).to(TRITON_DEVICE)
    uvqk = torch.randn(9, 4, 3, 20, generator=generator).to(TRITON_DEVICE)
    k, v = uvqk[:, 3], uvqk[:, 1]
    slots = torch.randperm(6 * page_size, generator=generator)[:5].to(TRITON_DEVICE)
    rows = torch.tensor([8, 0, 3, 1, 7], device=TRITON_DEVICE)
    expected = pages.clone()
    append_to_pages(k, v, rows, expected, slots, impl="torch")
    padding = torch.full((2,), -1, device=TRITON_DEVICE)
    append_to_pages(k, v, torch.cat([rows, padding]), pages, torch.cat([slots, padding]), impl="triton")
    assert torch.equal(pages, expected)
    append_to_pages(k, v, rows[:0], pages, slots[:0], impl="triton")
    append_to_pages(k.mT.contiguous().mT, v, rows, pages, slots, impl="triton")
    assert torch.equal(pages, expected)


def test_what_there_is_no_kernel_for_is_refused() -> None:
    q = torch.zeros(3, 1, 8, device=TRITON_DEVICE)
    arguments = {"seq_offsets": torch.tensor([0, 3]), "alpha": 1.0, "scaling_seqlen": 1, "impl": "triton"}
    with pytest.raises(ValueError, match=r"float32, torch.float16, torch.bfloat16, not in torch.float64"):
        hstu_attention(q.double(), q.double(), q.double(), **arguments)
    wide = torch.zeros(3, 1, 257, device=TRITON_DEVICE)
    with pytest.raises(ValueError, match="head dims up to 256, not 257"):
        hstu_attention(wide, wide, wide, **arguments)


def test_triton_is_for_nvidia_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="on an NVIDIA GPU, not on npu; choose auto, reference, blocked or ascend"):
        choose_impl("triton", "npu")
    assert choose_impl("auto", "cpu").name != "triton"
    monkeypatch.setattr(dispatch_module, "is_interpreting", lambda: False)
    with pytest.raises(UsageError, match="not on cpu; choose auto, reference, blocked or native"):
        choose_impl("triton", "cpu")
    monkeypatch.setattr(dispatch_module, "triton_state", lambda: TritonState(True, "triton 3.6.0"))
    assert choose_impl("auto", "cuda").name == "triton"
    assert choose_impl("triton", "cuda").reason == "as requested"
    assert choose_impl("auto", "cuda", gradients=True).name == "triton"
    assert choose_impl("auto", "npu", gradients=True).name == "blocked"
    monkeypatch.setattr(dispatch_module, "triton_state", lambda: TritonState(False, "triton is not installed"))
    choice = choose_impl("auto", "cuda")
    assert (choice.name, choice.reason) == ("blocked", "auto: triton is not installed")
    with pytest.raises(UnavailableError, match=r"--impl triton: triton is not installed\. Or choose blocked"):
        choose_impl("triton", "cuda")


class OnGpu:
    """What `choose_impl_for` asks of a tensor on a GPU."""

    def __init__(self, dtype: torch.dtype, requires_grad: bool = False) -> None:
        self.device, self.dtype, self.requires_grad = torch.device("cuda"), dtype, requires_grad


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        (OnGpu(torch.bfloat16), "triton"),
        (OnGpu(torch.float64), "blocked"),
        (OnGpu(torch.bfloat16, requires_grad=True), "blocked"),
    ],
    ids=["bf16", "float64", "gradient"],
)
def test_auto_takes_what_computes_with_the_tensors(tensor: OnGpu, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch_module, "is_interpreting", lambda: False)
    monkeypatch.setattr(dispatch_module, "triton_state", lambda: TritonState(True, "triton 3.6.0"))
    assert choose_impl_for("auto", tensor) == name


@pytest.mark.parametrize("chip", CHIPS)
def test_there_are_choices_for_every_chip(chip: int) -> None:
    from hstu_cli.kernels.attention.triton import configurations

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for head_dim in (1, 64, 65, 128, 200, 256):
            configs = configurations(chip, dtype, head_dim)
            assert 1 <= len(configs) == len(set(configs)) <= 4


def test_keys_are_split_where_rows_are_few() -> None:
    from hstu_cli.kernels.attention.triton import MORE_SPLITS, MOST_SPLITS, _Call

    def splits(num_sequences: int, new: int, cached: int, variant: str = "") -> int:
        plan = plan_batch(torch.arange(num_sequences + 1) * new, None, num_sequences * new, "meta")
        q = torch.empty(num_sequences * new, 4, 256, dtype=torch.bfloat16, device="meta")
        page_plan = plan_pages(
            torch.arange(num_sequences + 1) * (cached // 32), torch.zeros(num_sequences * cached // 32).long(),
            torch.full((num_sequences,), cached), num_sequences=num_sequences, num_pages=1, page_size=32, device="meta",
        )  # fmt: skip
        call = _Call(q, q, q, plan, None, page_plan, 1.0, 1, 132)
        tried = {config.variant for config in call.choices(90)}
        assert tried == ({"", MORE_SPLITS} if num_sequences * new < 16_000 else {""})
        return call.num_splits(dataclasses.replace(blocks(64, 64), variant=variant))

    assert splits(1, 128, 3968) == MOST_SPLITS
    assert splits(8, 128, 3968) == 2
    assert splits(8, 128, 3968, MORE_SPLITS) == 4
    assert splits(1, 4352, 0) == 1
    assert splits(1, 4352, 0, MORE_SPLITS) == 2
    assert splits(1, 128, 256) == 1
    assert splits(32, 4096, 0) == 1


@pytest.mark.parametrize("number", [0, -1], ids=["first", "last"])
def test_tuning_chooses_among_all(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few programs the last choices have twice the splits."""
    from hstu_cli.kernels.attention import triton

    chosen = []

    def choose(kernel, key, configs, run, **named):
        chosen.append(configs[number])
        return configs[number]

    monkeypatch.setattr(triton, "choose_config", choose)
    monkeypatch.setattr(triton, "FEW_ROUNDS", 10_000)
    inputs = make_inputs(AttentionCase((700,), (9,), num_heads=1, head_dim=16), torch.float16)
    assert_right(inputs, run(inputs))
    assert [config.variant for config in chosen] == ["" if number == 0 else triton.MORE_SPLITS]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase((4096, 100, 3000), (256, 0, 77), num_heads=4, head_dim=256),
        AttentionCase((8192,), (0,), num_heads=4, head_dim=128),
        AttentionCase((16_384,), (256,), num_heads=1, head_dim=64),
    ],
    ids=lambda case: case.id,
)
def test_long_sequences_on_a_gpu(case: AttentionCase, dtype: torch.dtype) -> None:
    """Against float64 in strips, with twice the error that the same strips make in the dtype."""
    inputs = make_inputs(case, dtype, "cuda")
    arguments = (inputs.q, inputs.k, inputs.v)
    sizes = (inputs.seq_offsets, inputs.num_candidates)
    scales = {"alpha": inputs.alpha, "scaling_seqlen": inputs.scaling_seqlen}
    exact = hstu_attention(*(x.double() for x in arguments), *sizes, **scales, impl="blocked")
    plain = hstu_attention(*arguments, *sizes, **scales, impl="blocked")
    output = hstu_attention(*arguments, *sizes, **scales, impl="triton")
    assert torch.equal(output, hstu_attention(*arguments, *sizes, **scales, impl="triton"))
    budget = 2 * ((plain.double() - exact).norm() + torch.finfo(dtype).eps * exact.norm())
    assert (output.double() - exact).norm() <= budget


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize(("new", "cached", "batch"), [(128, 3968, 1), (384, 3968, 8), (1, 16_000, 2)])
def test_pages_on_a_gpu(new: int, cached: int, batch: int, page_size: int) -> None:
    whole = AttentionCase((cached + new - new // 3,) * batch, (new // 3,) * batch, num_heads=4, head_dim=256)
    inputs = make_paged_inputs(PagedCase(whole, (cached,) * batch, page_size), torch.bfloat16)
    scales = {"alpha": inputs.new.alpha, "scaling_seqlen": inputs.new.scaling_seqlen}
    plan, page_plan = plans(inputs)

    def attend(dtype: torch.dtype, impl: str) -> torch.Tensor:
        q, k, v, pages = (x.to("cuda", dtype) for x in (inputs.new.q, inputs.new.k, inputs.new.v, inputs.pages))
        return paged_attention(q, k, v, plan, pages, page_plan, **scales, impl=impl).double()

    exact = attend(torch.float64, "blocked")
    output = attend(torch.bfloat16, "triton")
    assert torch.equal(output, attend(torch.bfloat16, "triton"))
    error = (attend(torch.bfloat16, "blocked") - exact).norm()
    assert (output - exact).norm() <= 2 * (error + torch.finfo(torch.bfloat16).eps * exact.norm())
