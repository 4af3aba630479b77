"""`--device npu` end to end on a stand-in for torch_npu: scores, operators, host waits, shapes."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.npu import STAND_IN, record, run_on_stand_in, why_no_stand_in

from hstu_cli.bench.verify import FP32_BUDGET
from hstu_cli.config import TASKS
from hstu_cli.kernels.attention.cases import ATTENTION_CASES

pytestmark = pytest.mark.skipif(why_no_stand_in() is not None, reason=str(why_no_stand_in()))

DOCS = Path(__file__).parent.parent / "docs" / "npu.md"
STEPS = 30
INFER = ["infer", "--config", "tiny", "--steps", str(STEPS), "--batch-size", "16", "--format", "json"]
NPU = ["--device", "npu"]
FP32 = ["--dtype", "fp32"]
ONE = ["--config", "tiny", "--num-iters", "1", "--num-iters-warmup", "0", "--format", "json"]
HOST_TIER = ["--num-pages", "40", "--host-cache-gb", "0.01"]

QUICK_START = ["infer", "--config", "kuairand_gr", "--steps", "4", "--device", "npu", "--checkpoint", "model.pt"]
"""As users of earlier tools type it."""

SAVE_CHECKPOINT = """
import torch
from hstu_cli.bench.setup import random_model_for
from hstu_cli.backend import Backend
from hstu_cli.config import MODEL_PRESETS
from hstu_cli.data.dataset import PreparedDataset, last_prepared
from hstu_cli.data.layout import data_root
root = data_root(None)
model = random_model_for(PreparedDataset(root, last_prepared(root)), MODEL_PRESETS['kuairand_gr'], Backend(), 0)
torch.save(model.state_dict(), 'model.pt')
"""

ATTENTION = """
import torch
from hstu_cli.kernels import jagged_attention, paged_attention, plan_batch, plan_pages
generator = torch.Generator().manual_seed(0)
lengths, candidates = torch.tensor([700, 3, 40]), torch.tensor([100, 3, 0])  # two strips of rows; one; one
plan = plan_batch(torch.tensor([0, 700, 703, 743]), candidates, 743, "npu")
pages = torch.randn(9, 2, 32, 2, 16, generator=generator).to("npu")
page_plan = plan_pages(
    torch.tensor([0, 3, 3, 4]), torch.tensor([1, 5, 2, 7]), torch.tensor([70, 0, 9]),
    num_sequences=3, num_pages=9, page_size=32, device="npu",
)
q, k, v = torch.randn(3, 743, 2, 16, generator=generator).to("npu")
call = {"alpha": 0.3, "scaling_seqlen": 100, "impl": "blocked"}
for _ in range(NUM_LAYERS):
    jagged_attention(q, k, v, plan, **call)
for _ in range(NUM_LAYERS):
    paged_attention(q, k, v, plan, pages, page_plan, **call)
"""

CHIP = f"""
import pytest
class Outcomes(dict):
    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self[report.nodeid] = [report.outcome, report.longreprtext]
outcomes = Outcomes()
pytest.main(["-p", "no:cacheprovider", {str(Path(__file__).parent / "test_npu_chip.py")!r}], plugins=[outcomes])
result = dict(outcomes)
"""

LAYER = ["bench-layer", *ONE, "--history", "8,70", "--cached", "4", "--candidates", "0,3", "--batch-size", "1,2"]
TRAIN = ["train", "--config", "tiny", "--epochs", "1", "--batch-size", "256", "--out", "trained"]
TRAIN += ["--until", "2022-04-12", "--format", "json"]
FUSED = ["bench-fused", "2", "--embedding-dim", "64", "--num-heads", "2", "--seqlens", "70,24", "--batch-size", "2"]
FUSED += ["--jagged", "--num-iters", "1", "--num-iters-warmup", "0", "--format", "json"]
E2E = ["bench-e2e", *ONE, "--history-step", "4", "--num-batches", "3", "--candidates", "3", "--num-users", "1,2"]

JOBS: dict[str, dict[str, Any]] = {
    "cpu": {"args": [*INFER, *FP32, "--device", "cpu", "--impl", "blocked", "--predictions-out", "cpu.parquet"]},
    "uncached": {"args": [*INFER, *NPU, *FP32, "--no-kv-cache", "--predictions-out", "uncached.parquet"]},
    "cached": {"args": [*INFER, *NPU, *FP32, "--predictions-out", "cached.parquet"]},
    "host tier": {"args": [*INFER, *NPU, *FP32, *HOST_TIER, "--predictions-out", "host tier.parquet"]},
    "unpadded": {"args": [*INFER, *NPU, *FP32, "--predictions-out", "unpadded.parquet"], "unpadded": True},
    "reference": {
        "args": [*INFER, *NPU, *FP32, *HOST_TIER, "--impl", "reference", "--predictions-out", "reference.parquet"]
    },
    "bf16, verified": {"args": [*INFER, *NPU, *HOST_TIER, "--verify-cache", "7"]},
    "bench-layer": {"args": [*LAYER, *NPU, "--cache-tier", "host", "--compare", "eager"]},
    "bench-layer, device tier": {"args": [*LAYER, *NPU]},
    "bench-e2e": {"args": [*E2E, *NPU]},
    "train": {"args": [*TRAIN, *NPU, *FP32]},
    "bench-fused": {"args": [*FUSED, *NPU, "--compare", "eager"]},
    "bench-fused, fp32": {"args": [*FUSED, *NPU, *FP32]},
    "save": {"code": SAVE_CHECKPOINT},
    "quick start": {"args": QUICK_START},
    "1 layer": {"code": f"NUM_LAYERS = 1{ATTENTION}"},
    "8 layers": {"code": f"NUM_LAYERS = 8{ATTENTION}"},
    "tests of the chip": {"code": CHIP, "graphs": True},
    "env": {"args": ["env", "--format", "json"]},
    "index": {"args": [*INFER, "--device", "npu:1"]},
    "triton": {"args": [*INFER, *NPU, "--impl", "triton"]},
    "ascend": {"args": [*INFER, *NPU, "--impl", "ascend"]},
    "native": {"args": [*INFER, *NPU, "--impl", "native"]},
    "dynamicemb": {"args": [*INFER, *NPU, "--embedding", "dynamicemb"]},
    "graphs": {"args": [*INFER, *NPU, "--cuda-graph"]},
    "append": {"args": [*INFER, *NPU, "--append-impl", "triton"]},
}

ON_NPU = ["uncached", "cached", "host tier", "bf16, verified", "bench-layer", "bench-layer, device tier", "bench-e2e"]
TRAINING = ["train", "bench-fused", "bench-fused, fp32"]
WATCHED = [*ON_NPU, *(f"{name}, watched" for name in TRAINING)]
"""Being watched changes how autograd adds gradients up, so training also runs without: the documentation lists that."""
for name in ON_NPU:
    JOBS[name]["watched"] = True
for name in TRAINING:
    arguments = [argument.replace("trained", "trained again") for argument in JOBS[name]["args"]]
    JOBS[f"{name}, watched"] = {"args": arguments, "watched": True}
REPLAYS = ["uncached", "cached", "host tier"]
MASK_OPERATORS = {"arange", "ge", "lt", "ne", "minimum", "bitwise_and", "bitwise_or", "bitwise_not"}
MEMORY_ALONE = {"copy_", "empty.memory_format", "empty_strided"}
"""Operators that allocate or move bytes, and are not prepared for a shape."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("npu")
    found = dict(zip(JOBS, run_on_stand_in(list(JOBS.values()), home), strict=True))
    found["home"] = home
    return found


def logits(home: Path, name: str) -> np.ndarray:
    table = pq.read_table(home / f"{name}.parquet")
    return np.stack([table[f"logit_{task}"].to_numpy() for task in TASKS], 1)


@pytest.mark.parametrize("name", [*ON_NPU, *TRAINING])
def test_it_runs_and_says_on_what(outcomes: dict[str, Any], name: str) -> None:
    found = record(outcomes[name])
    assert found["status"] == "valid"
    device = found["device"]
    assert (device["actual"], device["name"]) == ("npu:0", "Ascend910B-stand-in")
    assert device["impl"] == "blocked"
    assert device["dtype"] == ("fp32" if set(FP32) <= set(JOBS[name]["args"]) else "bf16")


@pytest.mark.parametrize("name", [*REPLAYS, "unpadded", "reference"])
def test_scores_are_those_of_the_cpu(outcomes: dict[str, Any], name: str) -> None:
    record(outcomes["cpu"])
    expected, found = (logits(outcomes["home"], x) for x in ("cpu", name))
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= FP32_BUDGET * np.linalg.norm(expected)


def test_metrics_are_those_of_the_cpu(outcomes: dict[str, Any]) -> None:
    expected, found = (record(outcomes[x])["metrics"] for x in ("cpu", "host tier"))
    assert found == expected


def test_the_host_tier_is_used(outcomes: dict[str, Any]) -> None:
    for name in ("host tier", "bf16, verified"):
        cache = record(outcomes[name])["kv_cache"]
        assert min(cache[x] for x in ("evictions", "bytes_onloaded", "bytes_offloaded", "host_hit_tokens")) > 0
    assert cache["verified"]["num_requests"] > 10


@pytest.mark.parametrize("name", WATCHED)
def test_no_operator_falls_back_to_the_cpu(outcomes: dict[str, Any], name: str) -> None:
    """What torch hands to the device is listed, a view, or made of others, which the stand-in refuses unless listed."""
    record(outcomes[name])
    text = (STAND_IN / "npu_ops_2.13.0.txt").read_text(encoding="utf-8")
    listed = {line for line in text.splitlines() if not line.startswith("#")}
    watched = {operator.removesuffix(".default") for operator in outcomes[name]["watched"]}
    assert watched & listed
    assert {x for x in watched - listed if not is_view(x) and not is_made_of_others(x)} == set()


def is_view(name: str) -> bool:
    base, _, overload = name.partition(".")
    returns = getattr(getattr(torch.ops.aten, base), overload or "default")._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def is_made_of_others(name: str) -> bool:
    keys = ("CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key) for key in keys)


def test_the_documentation_lists_the_operators(outcomes: dict[str, Any]) -> None:
    """Those of inference in one block; what training uses beyond them in the next."""
    inference, training = (
        {x.removesuffix(".default") for name in names for x in outcomes[name]["recorded"]["operators"]}
        for names in (ON_NPU, TRAINING)
    )
    section = re.search(r"## Operators\n(.*?)\n## ", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    blocks = [block.split() for block in re.findall(r"```text\n(.*?)```", section[1], re.DOTALL)]
    assert blocks == [sorted(inference), sorted(training - inference)]


@pytest.mark.parametrize("name", REPLAYS)
def test_a_step_waits_for_its_results_alone(outcomes: dict[str, Any], name: str) -> None:
    """Twice: for the logits, and for the rank of the next item. The replay waits twice more, to take the time."""
    steps = record(outcomes[name])["num_batches"]
    waits = Counter()
    for where, count in outcomes[name]["recorded"]["syncs"].items():
        waits[where.replace("hstu_cli/", "")] = count
    loading = [where for where in waits if where.endswith("commands/infer.py:infer")]
    for where in loading:
        del waits[where]
    assert waits == {
        "copy to the host at model/engine.py:_score": steps + 1,  # one to warm up
        "copy to the host at bench/replay.py:_target_ranks": steps,
        "synchronize at backend/streams.py:synchronize": 2 * steps,
    }


def test_the_tests_of_the_chip_pass_on_the_stand_in(outcomes: dict[str, Any]) -> None:
    outcome = outcomes["tests of the chip"]
    assert outcome["error"] is None, outcome
    assert {name: found for name, found in outcome["result"].items() if found[0] != "passed"} == {}
    assert len(outcome["result"]) == 7 + len(ATTENTION_CASES)


def test_masks_are_made_once_for_all_layers(outcomes: dict[str, Any]) -> None:
    one, eight = (Counter(outcomes[name]["recorded"]["operators"]) for name in ("1 layer", "8 layers"))
    made = {name for name in one if name.partition(".")[0] in MASK_OPERATORS}
    assert len(made) >= len(MASK_OPERATORS)
    assert {name: eight[name] for name in made} == {name: one[name] for name in made}
    assert eight["bmm.default"] == 8 * one["bmm.default"] > 0


def shapes_of(outcome: dict[str, Any]) -> Counter[str]:
    """Distinct shapes of each operator that computes."""
    return Counter(name for name, _, _ in outcome["recorded"]["shapes"] if name not in MEMORY_ALONE)


def test_shapes_are_few(outcomes: dict[str, Any]) -> None:
    padded, plain = (shapes_of(outcomes[name]) for name in ("cached", "unpadded"))
    assert padded.total() <= 300
    assert padded.total() < 0.5 * plain.total()
    assert max(padded.values()) <= 25


def test_eager_rows_and_skipped_graphs_are_reported(outcomes: dict[str, Any]) -> None:
    rows = record(outcomes["bench-layer"])["rows"]
    assert {row["impl"] for row in rows} == {"blocked", "eager"}
    assert {row["cache_tier"] for row in rows} == {None, "host"}
    rows = record(outcomes["bench-e2e"])["rows"]
    skipped = {row["variant"]: row.get("skipped") for row in rows}
    assert skipped["baseline"] is skipped["kvcache"] is None
    assert "NPUGraph" in skipped["kvcache+graph"]


@pytest.mark.parametrize("name", ["bench-fused", "bench-fused, fp32"])
def test_training_layers_are_measured(outcomes: dict[str, Any], name: str) -> None:
    """Latency, gradients that are right, and the peaks that the device's allocator counts."""
    rows = record(outcomes[name])["rows"]
    assert [row["seqlen"] for row in rows] == [70] * (len(rows) // 2) + [24] * (len(rows) // 2)
    assert {row["impl"] for row in rows} == ({"blocked"} if name.endswith("fp32") else {"blocked", "eager"})
    assert not any("skipped" in row for row in rows)
    assert max(row["gradient_error"] for row in rows) < (1e-5 if name.endswith("fp32") else 0.05)
    peaks = {row["variant"]: row["peak_memory_bytes"] for row in rows if row["seqlen"] == 70 and row["impl"] != "eager"}
    assert peaks["baseline"] > peaks["optimized"] > peaks["+layernorm_recompute"] > peaks["+silu_recompute"] > 0


def test_the_quick_start_runs_word_for_word(outcomes: dict[str, Any]) -> None:
    outcome = outcomes["quick start"]
    assert outcome["exit_code"] == 0, outcome["stderr"]
    found = json.loads(outcome["stdout"][outcome["stdout"].index("\n{") :])
    assert found["num_batches"] == 4
    assert found["model"]["weights"] == "checkpoint"
    assert found["device"]["dtype"] == "bf16"
    assert " ".join(["hstu", *QUICK_START]) in DOCS.read_text(encoding="utf-8")


def test_env_names_the_device(outcomes: dict[str, Any]) -> None:
    found = record(outcomes["env"])
    assert found["backends"]["npu"] == {"available": True, "devices": ["Ascend910B-stand-in"], "reason": None}
    assert found["device"]["actual"] == "npu:0"
    assert found["ascend"]["available"] is False


@pytest.mark.parametrize(
    ("name", "exit_code", "message"),
    [
        ("index", 3, "there is only npu:0; npu-smi info lists the NPUs"),
        ("triton", 2, "'triton' runs on an NVIDIA GPU, not on npu"),
        ("native", 2, "'native' runs on a CPU, not on npu"),
        ("ascend", 3, "torch.ops.mxrec has no hstu_jagged and hstu_paged; build RecSDK's cust_op"),
        ("dynamicemb", 3, "DynamicEmb runs on NVIDIA GPUs alone, and this device is npu"),
        ("graphs", 3, "torch.npu has no NPUGraph"),
        ("append", 2, "--append-impl triton runs on an NVIDIA GPU, not on npu; choose from auto, torch."),
    ],
)
def test_what_cannot_be_is_said(outcomes: dict[str, Any], name: str, exit_code: int, message: str) -> None:
    outcome = outcomes[name]
    assert outcome["exit_code"] == exit_code, outcome["stderr"]
    assert outcome["stdout"] == ""
    assert message in " ".join(outcome["stderr"].split())
    assert "Traceback" not in outcome["stderr"]
