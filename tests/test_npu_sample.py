"""Shapes and replays on an NPU over real requests, counted by the stand-in: few shapes with padding, few new ones."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import SAMPLE_MD5
from support.npu import record, run_on_stand_in, why_no_stand_in

pytestmark = pytest.mark.skipif(why_no_stand_in() is not None, reason=str(why_no_stand_in()))

INFER = ["infer", "--config", "tiny", "--device", "npu", "--dtype", "fp32", "--from", "2022-05-01"]
INFER += ["--num-pages", "400", "--host-cache-gb", "0.1", "--format", "json"]
REPLAYS = {"1": (40, 60), "8": (18, 30), "32": (0, 6)}
"""Of 60 steps, the least and the most that are replayed, by the requests of a step; tokens alone decide it."""

MEMORY_ALONE = {"copy_", "empty.memory_format", "empty_strided"}


@pytest.fixture(scope="module")
def outcomes(sample_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    archive = ["--dataset", "pure", "--archive", str(sample_archive), "--md5", SAMPLE_MD5, "--format", "json"]
    jobs: dict[str, dict[str, Any]] = {"prepare": {"args": ["preprocess", "kuairand", *archive]}}
    for steps in ("25", "50"):
        jobs[steps] = {"args": [*INFER, "--steps", steps]}
    jobs["50 unpadded"] = {"args": [*INFER, "--steps", "50"], "unpadded": True}
    for requests in REPLAYS:
        arguments = [*INFER, "--steps", "60", "--batch-size", requests, "--cuda-graph"]
        jobs[f"graphs, {requests}"] = {"args": arguments, "graphs": True}
    found = dict(zip(jobs, run_on_stand_in(list(jobs.values()), tmp_path_factory.mktemp("sample")), strict=True))
    for outcome in found.values():
        record(outcome)
    return found


@pytest.fixture(scope="module")
def num_shapes(outcomes: dict[str, Any]) -> dict[str, int]:
    """Pairs of operator and shape, by the number of batches; copies and allocations are prepared for no shape."""
    found = {
        name: Counter(operator not in MEMORY_ALONE for operator, _, _ in outcomes[name]["recorded"]["shapes"])[True]
        for name in ("25", "50", "50 unpadded")
    }
    print(json.dumps(found))
    return found


def test_shapes_are_few_and_soon_known(num_shapes: dict[str, int]) -> None:
    assert num_shapes["50"] <= 850
    assert num_shapes["50"] <= 0.3 * num_shapes["50 unpadded"]
    assert num_shapes["50"] - num_shapes["25"] <= 0.5 * num_shapes["25"]


def test_how_many_steps_are_replayed(outcomes: dict[str, Any]) -> None:
    """Of one request most, of many hardly any: histories differ, and all sequences of a graph have one size."""
    found = {requests: record(outcomes[f"graphs, {requests}"])["cuda_graph"] for requests in REPLAYS}
    print(json.dumps({requests: graphs["replays"] for requests, graphs in found.items()}))
    for requests, graphs in found.items():
        assert graphs["replays"] + graphs["eager_steps"] == 60
        least, most = REPLAYS[requests]
        assert least <= graphs["replays"] <= most
