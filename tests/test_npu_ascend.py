"""`impl="ascend"`: RecSDK's operators called as documented, with stand-ins for them that compute by loops."""

from pathlib import Path
from typing import Any

import pytest
from support.npu import record, run_on_stand_in, why_no_stand_in

from hstu_cli.bench.verify import FP32_BUDGET
from hstu_cli.kernels.attention import ascend

pytestmark = pytest.mark.skipif(why_no_stand_in() is not None, reason=str(why_no_stand_in()))

ATTENTION = """
import torch
from hstu_cli.kernels import hstu_attention
from hstu_cli.kernels.attention.cases import ATTENTION_CASES, make_inputs
result = {}
for case in ATTENTION_CASES:
    if case.head_dim % 16:
        continue
    x = make_inputs(case, torch.float32)
    call = {"alpha": x.alpha, "scaling_seqlen": x.scaling_seqlen}
    there = [t.to("npu") for t in (x.q, x.k, x.v)]
    found = hstu_attention(*there, x.seq_offsets, x.num_candidates, impl="ascend", **call).cpu()
    wide = [t.double() for t in (x.q, x.k, x.v)]
    exact = hstu_attention(*wide, x.seq_offsets, x.num_candidates, impl="reference", **call)
    result[case.id] = float((found - exact).norm() / (exact.norm() + 1e-300))
"""

PAGED = """
import torch
from hstu_cli.kernels import paged_attention, plan_batch, plan_pages
def with_pages(history, known, candidates, heads=2, dim=16, size=32):
    generator = torch.Generator().manual_seed(0)
    pages = torch.full((20, 2, size, heads, dim), 1e3)  # what nobody may read
    tables, new, free = [], [], 1
    for n, m, c in zip(history, known, candidates, strict=True):
        kv = torch.randn(2, n + c, heads, dim, generator=generator)
        table = list(range(free, free := free + -(-n // size)))
        for i in range(n):
            pages[table[i // size], :, i % size] = kv[:, i]
        tables.append(table)
        new.append(kv[:, m:])
    k, v = torch.cat(new, 1)
    q = torch.randn(k.shape, generator=generator)
    def run(device, dtype, impl):
        there = [x.to(device, dtype) for x in (q, k, v)]
        lengths = torch.tensor([0, *(x.shape[1] for x in new)])
        plan = plan_batch(lengths.cumsum(0), torch.tensor(candidates), len(q), device)
        page_plan = plan_pages(
            torch.tensor([0, *map(len, tables)]).cumsum(0), torch.tensor(sum(tables, [])), torch.tensor(known),
            num_sequences=len(tables), num_pages=20, page_size=size, device=device, history_stored=True,
        )
        call = {"alpha": 0.3, "scaling_seqlen": 12, "impl": impl}
        return paged_attention(*there, plan, pages.to(device, dtype), page_plan, **call)
    exact = run("cpu", torch.float64, "reference")
    return float((run("npu", torch.float32, "ascend").cpu() - exact).norm() / exact.norm())
"""

WITHOUT_HISTORY = (
    PAGED
    + """
result = [
    with_pages([38, 0, 64, 33], [32, 0, 64, 0], [1, 2, 3, 0]),
    with_pages([0, 65], [0, 31], [4, 1]),
    with_pages([40, 0], [32, 0], [0, 0], size=64),
]
"""
)

TOO_LARGE = (
    PAGED
    + """
torch.npu.mem_get_info = lambda index=0: (500, 8 << 30)
try:
    with_pages([6, 8], [4, 8], [1, 3])
except ValueError as error:
    result = str(error)
finally:
    del torch.npu.mem_get_info
"""
)

REFUSED = """
import torch
from hstu_cli.kernels import hstu_attention, hstu_paged_attention
def refused(function, *arguments):
    try:
        function(*arguments, alpha=1.0, scaling_seqlen=10, impl="ascend")
    except ValueError as error:
        return str(error)
def one(tokens, heads, dim, candidates):
    q = torch.zeros(tokens, heads, dim, device="npu")
    return q, q, q, torch.tensor([0, tokens]), torch.tensor([candidates])
def pages(size):
    return torch.zeros(2, 2, size, 1, 16, device="npu")
table = torch.tensor([0, 1]), torch.tensor([1]), torch.tensor([3])
result = [
    refused(hstu_attention, *one(4, 1, 24, 0)),
    refused(hstu_attention, *one(4, 17, 16, 0)),
    refused(hstu_attention, *one(600, 1, 16, 513)),
    refused(hstu_paged_attention, *one(4, 1, 16, 1), pages(32), *table),
    *(refused(hstu_paged_attention, *one(4, 1, 16, 1), pages(size), *table) for size in (16, 48, 96, 512)),
]
"""

INFER = ["infer", "--config", "tiny", "--steps", "12", "--batch-size", "8", "--dtype", "fp32", "--device", "npu"]
INFER += ["--impl", "ascend", "--format", "json"]
LAYER = [
    "bench-layer",
    "--config",
    "tiny",
    "--num-iters",
    "1",
    "--history",
    "40",
    "--cached",
    "33",
    "--candidates",
    "0,3",
]
LAYER += ["--batch-size", "2", "--device", "npu", "--impl", "ascend", "--dtype", "fp32", "--format", "json"]

E2E = ["bench-e2e", "--config", "tiny", "--device", "npu", "--impl", "ascend", "--format", "json"]
E2E += ["--history-step", "8", "--num-batches", "2"]

OTHER_ARGUMENTS = """
import torch
library = torch.library.Library("mxrec", "FRAGMENT")
library.define("hstu_jagged(Tensor q, Tensor k, Tensor v, int maskType=0, int maxSeqLen=0) -> Tensor")
library.define("hstu_paged(Tensor q, Tensor k, Tensor v, int maskType=0) -> Tensor")
from hstu_cli.kernels.attention.ascend import why_unavailable
result = why_unavailable()
"""


def test_a_library_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert ascend.why_unavailable().startswith("torch.ops.mxrec has no hstu_jagged and hstu_paged; build RecSDK's")
    (tmp_path / ascend.LIBRARY).write_bytes(b"no library")
    assert ascend.why_unavailable().startswith(f"{tmp_path / ascend.LIBRARY} does not load (")


@pytest.fixture(scope="module", params=[False, True], ids=["equal first", "delta first"])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    jobs = {
        "register": {"code": f"import recsdk; recsdk.register(delta_first={request.param})"},
        "attention": {"code": ATTENTION},
        "without history": {"code": WITHOUT_HISTORY},
        "too large": {"code": TOO_LARGE},
        "refused": {"code": REFUSED},
        "cached": {"args": [*INFER, "--verify-cache", "1"]},
        "uncached": {"args": [*INFER, "--no-kv-cache"]},
        "bench-layer": {"args": LAYER},
        "env": {"args": ["env", "--format", "json"]},
        "pages of infer": {"args": [*INFER, "--page-size", "48"]},
        "pages of bench-layer": {"args": [*LAYER, "--page-size", "48"]},
        "pages of bench-e2e": {"args": [*E2E, "--page-size", "48"]},
        "uncached, any page": {"args": [*INFER, "--no-kv-cache", "--page-size", "48"]},
    }
    found = run_on_stand_in(list(jobs.values()), tmp_path_factory.mktemp("ascend"))
    return dict(zip(jobs, found, strict=True))


def test_whole_sequences_are_right(outcomes: dict[str, Any]) -> None:
    assert outcomes["attention"]["error"] is None, outcomes["attention"]
    errors = outcomes["attention"]["result"]
    assert len(errors) == 10
    assert max(errors.values()) <= FP32_BUDGET


def test_cached_scores_are_right(outcomes: dict[str, Any]) -> None:
    """Each request is compared with itself uncached, and with float64 on the CPU by plain torch."""
    found = record(outcomes["cached"])
    assert found["device"]["impl"] == "ascend"
    cache = found["kv_cache"]
    assert cache["device_hit_tokens"] > 0
    assert cache["verified"]["num_requests"] == found["num_requests"]
    assert max(cache["verified"][f"worst_{what}_error"] for what in ("cached", "uncached")) <= FP32_BUDGET
    assert record(outcomes["uncached"])["metrics"] == found["metrics"]
    assert record(outcomes["uncached, any page"])["metrics"] == found["metrics"]


def test_users_without_history_read_no_page(outcomes: dict[str, Any]) -> None:
    assert outcomes["without history"]["error"] is None, outcomes["without history"]
    assert max(outcomes["without history"]["result"]) <= FP32_BUDGET


def test_a_mask_that_does_not_fit_is_refused(outcomes: dict[str, Any]) -> None:
    said = outcomes["too large"]["result"]
    assert "needs a mask of 2 x 2 x 3 x 11 torch.float32" in said
    assert "npu:0 has 0.0 GB left; take smaller batches, or impl='blocked'" in said


def test_the_benchmark_of_the_layer_checks_it(outcomes: dict[str, Any]) -> None:
    rows = record(outcomes["bench-layer"])["rows"]
    assert [row["cached_length"] for row in rows] == [0, 33, 0, 33]
    assert {row["impl"] for row in rows} == {"ascend"}


def test_env_says_that_the_operators_are_there(outcomes: dict[str, Any]) -> None:
    assert record(outcomes["env"])["ascend"]["available"] is True


def test_what_the_operators_are_not_documented_for_is_refused(outcomes: dict[str, Any]) -> None:
    heads, many, candidates, unstored, *page_sizes = outcomes["refused"]["result"]
    assert "multiples of 16" in heads
    assert "not 17 x 16" in many
    assert "not 600 and 513" in candidates
    assert "reads new history from the pages" in unstored
    assert page_sizes == [
        f"impl='ascend' takes pages of 32, 64, 128 or 256 tokens, not {size}" for size in (16, 48, 96, 512)
    ]


@pytest.mark.parametrize("command", ["infer", "bench-layer", "bench-e2e"])
def test_commands_refuse_pages_that_the_operator_cannot_read(outcomes: dict[str, Any], command: str) -> None:
    outcome = outcomes[f"pages of {command}"]
    assert outcome["exit_code"] == 2, outcome["stderr"]
    assert "--page-size 48: impl='ascend' takes pages of 32, 64, 128 or 256 tokens" in " ".join(
        outcome["stderr"].split()
    )
    assert outcome["stdout"] == ""


def test_a_release_with_other_arguments_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    (outcome,) = run_on_stand_in([{"code": OTHER_ARGUMENTS}], tmp_path_factory.mktemp("other"))
    assert "hstu_jagged has other arguments than are documented" in outcome["result"]
