"""On an Ascend NPU: scores are the CPU's, and those over a cache in two tiers are the uncached ones.

`test_npu.py` runs this file on its stand-in, so that it is known to pass where everything is right.
"""

import numpy as np
import pytest
import torch
from support.cli import record_of
from test_attention import oracle

from hstu_cli.backend import NpuBackend
from hstu_cli.kernels import hstu_attention
from hstu_cli.kernels.attention.cases import ATTENTION_CASES, AttentionCase, make_inputs

pytestmark = pytest.mark.npu

INFER = ["infer", "--config", "tiny", "--steps", 30, "--batch-size", 16]
BENCHMARKS = {
    "bench-layer": ["--history", "8,70", "--cached", 4, "--candidates", "0,3", "--batch-size", "1,2"],
    "bench-e2e": ["--history-step", 4, "--num-batches", 3, "--candidates", 3, "--num-users", "1,2"],
}


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "auto"])
def test_cached_scores_are_right(dtype: str) -> None:
    tiers = ["--num-pages", 40, "--host-cache-gb", 0.01]
    found = record_of(*INFER, *tiers, "--device", "npu", "--dtype", dtype, "--verify-cache", 1)
    assert found["status"] == "valid"
    assert found["kv_cache"]["bytes_onloaded"] > 0


def test_replayed_scores_are_right() -> None:
    if reason := NpuBackend().why_no_graphs():
        pytest.skip(reason)
    found = record_of(*INFER, "--device", "npu", "--cuda-graph", "--verify-cache", 1)
    assert found["status"] == "valid"
    assert found["cuda_graph"]["replays"] > 0


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.id)
def test_attention_is_as_exact_as_rounding_allows(case: AttentionCase) -> None:
    inputs = make_inputs(case, torch.float16)
    there = [x.to(NpuBackend().device) for x in (inputs.q, inputs.k, inputs.v)]
    call = {"alpha": inputs.alpha, "scaling_seqlen": inputs.scaling_seqlen, "impl": "blocked"}
    out = hstu_attention(*there, inputs.seq_offsets, inputs.num_candidates, **call).cpu()
    expected, bound = oracle(inputs)
    assert ((out.double() - expected).abs() <= bound).all()


def test_metrics_are_those_of_the_cpu() -> None:
    expected, found = (record_of(*INFER, "--dtype", "fp32", "--device", device) for device in ("cpu", "npu"))
    for task, value in expected["metrics"]["auc"].items():
        assert value is None or np.isclose(found["metrics"]["auc"][task], value, atol=1e-3)


@pytest.mark.parametrize("command", BENCHMARKS)
def test_benchmarks_check_their_outputs(command: str) -> None:
    found = record_of(command, "--config", "tiny", "--device", "npu", "--num-iters", 2, *BENCHMARKS[command])
    assert found["status"] == "valid"
