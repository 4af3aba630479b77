"""Distinct shapes on an NPU over real requests, counted by the stand-in: few with padding, and few new ones."""

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
MEMORY_ALONE = {"copy_", "empty.memory_format", "empty_strided"}


@pytest.fixture(scope="module")
def num_shapes(sample_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Pairs of operator and shape, by the number of batches; copies and allocations are prepared for no shape."""
    archive = ["--dataset", "pure", "--archive", str(sample_archive), "--md5", SAMPLE_MD5, "--format", "json"]
    jobs: dict[str, dict[str, Any]] = {"prepare": {"args": ["preprocess", "kuairand", *archive]}}
    for steps in ("25", "50"):
        jobs[steps] = {"args": [*INFER, "--steps", steps]}
    jobs["50 unpadded"] = {"args": [*INFER, "--steps", "50"], "unpadded": True}
    outcomes = dict(zip(jobs, run_on_stand_in(list(jobs.values()), tmp_path_factory.mktemp("sample")), strict=True))
    for outcome in outcomes.values():
        record(outcome)
    found = {
        name: Counter(operator not in MEMORY_ALONE for operator, _, _ in outcome["recorded"]["shapes"])[True]
        for name, outcome in outcomes.items()
    }
    del found["prepare"]
    print(json.dumps(found))
    return found


def test_shapes_are_few_and_soon_known(num_shapes: dict[str, int]) -> None:
    assert num_shapes["50"] <= 850
    assert num_shapes["50"] <= 0.3 * num_shapes["50 unpadded"]
    assert num_shapes["50"] - num_shapes["25"] <= 0.5 * num_shapes["25"]
