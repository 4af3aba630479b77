"""`hstu compare`: two saved records side by side."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cli import failure_of, invoke, record_of

from hstu_cli.commands.comparison import BUSY
from hstu_cli.timing import latency_summary, noise_warnings


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A real record but for its times, which are a quiet machine's: 100 ms uncached, 50 ms cached, within 4 %."""
    path = tmp_path_factory.mktemp("records") / "a.json"
    record = record_of("bench-layer", *TINY, "--num-iters", "2", "--output-json", path)
    for row in record["rows"]:
        cached = row["cached_length"] > 0
        samples = np.array([98.0, 99.0, 100.0, 101.0, 102.0]) / (2 if cached else 1)
        row["latency_ms"] = latency_summary(samples)
        row |= {"speedup_vs_uncached": 2.0, "speedup_range": [1.9, 2.1]} if cached else {}
    return record | {"warnings": []}


TINY = ("--config", "tiny", "--history", "16,32", "--cached", "1/2", "--candidates", "0", "--batch-size", "1")


def saved(path: Path, record: dict[str, Any], speed: float = 1.0, **changes: Any) -> Path:
    """The record with every latency divided by `speed`."""
    changed = copy.deepcopy(record) | changes
    for row in changed["rows"]:
        row["latency_ms"] = latency_summary(np.array(row["latency_ms"]["samples"]) / speed)
    path.write_text(json.dumps(changed))
    return path


def slowed(record: dict[str, Any], *cases: int, factor: float, speedup: float | None = None) -> dict[str, Any]:
    """The record with some of its cases slower, and with other speed-ups if they are named."""
    changed = copy.deepcopy(record)
    for index in cases:
        row = changed["rows"][index]
        row["latency_ms"] = latency_summary(np.array(row["latency_ms"]["samples"]) * factor)
        if speedup is not None:
            row |= {"speedup_vs_uncached": speedup, "speedup_range": [0.95 * speedup, 1.05 * speedup]}
    return changed


def test_ratios_are_speeds_of_the_second(measured: dict[str, Any], tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a.json", measured), saved(tmp_path / "b.json", measured, speed=1.25)
    record = record_of("compare", a, b, "--fail-below", "1.2")
    assert record["compared"] == "bench-layer"
    assert record["differences"] == []
    assert [row["speed_ratio"] for row in record["rows"]] == pytest.approx([1.25] * 4)
    assert [row["ranges_overlap"] for row in record["rows"]] == [False] * 4
    assert [row["speedup_ratio"] for row in record["rows"]] == [None, 1.0, None, 1.0]
    assert [row["verdict"] for row in record["rows"]] == ["passes"] * 4
    assert record["rows"][1]["case"].startswith("batch_size 1, history_length 16, cached_length 8")


def test_ranges_stand_beside_the_medians(measured: dict[str, Any], tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a.json", measured), saved(tmp_path / "b.json", measured, speed=1.02)
    row = record_of("compare", a, b)["rows"][0]
    assert row["a_range_ms"] == [98, 102]
    assert row["b_range_ms"] == pytest.approx([98 / 1.02, 100])
    assert row["ranges_overlap"]
    output = " ".join(invoke("compare", a, b).stdout.split())
    assert "│ 100 (98-102) │ 98.04 (96.08-100) │ 1.020 │ overlap │" in output
    assert "│ 2.00 (1.90-2.10) │ 2.00 (1.90-2.10) │ 1.000 │" in output


@pytest.mark.parametrize(("case", "speedup"), [(2, None), (3, 1.0)], ids=["uncached", "cached"])
def test_a_slow_case_fails_and_is_named(
    measured: dict[str, Any], tmp_path: Path, case: int, speedup: float | None
) -> None:
    a = saved(tmp_path / "a.json", measured)
    b = saved(tmp_path / "b.json", slowed(measured, case, factor=2, speedup=speedup))
    result = invoke("compare", a, b, "--fail-below", "0.9", "--format", "json")
    assert result.exit_code == 1
    record = json.loads(result.stdout)
    assert record["status"] == "invalid"
    assert [index for index, row in enumerate(record["rows"]) if row["verdict"] == "slower"] == [case]
    assert "in 1 of 4 cases, at worst 0.500 in batch_size 1, history_length 32" in result.stderr
    assert invoke("compare", a, b).exit_code == 0
    assert "at worst 0.500" in " ".join(
        invoke("compare", a, b, "--fail-below", "0.9").stdout.split("What differs")[0].split()
    )


CEILINGS = {"matmul_flops_per_s": 1e12, "bytes_per_s": 2e10}
SLOW_CEILINGS = CEILINGS | {"bytes_per_s": 1e10}


@pytest.mark.parametrize(
    ("changes", "speed", "doubt"),
    [
        ({"warnings": ["machine busy: other processes used 42% of the CPUs"]}, 0.7, "B had a busy machine"),
        ({"ceilings": SLOW_CEILINGS}, 0.7, "the machine's own bytes_per_s fell to 0.500 of A's"),
        ({}, 140.0, "under 10 ms in all is too short to trust"),
    ],
    ids=["busy", "slow-machine", "short"],
)
def test_a_slower_machine_is_a_doubt_and_no_failure(
    measured: dict[str, Any], tmp_path: Path, changes: dict[str, Any], speed: float, doubt: str
) -> None:
    a = saved(tmp_path / "a.json", measured, speed=200 if speed > 1 else 1, ceilings=CEILINGS)
    b = saved(tmp_path / "b.json", measured, speed=speed, **{"ceilings": CEILINGS} | changes)
    result = invoke("compare", a, b, "--fail-below", "0.9", "--format", "json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert [row["verdict"] for row in record["rows"]] == ["in doubt"] * 4
    assert record["rows"][0]["doubt"] == doubt
    assert "4 of 4 cases are below 0.9 of A's speed, but may be no slower" in result.stderr
    assert record["warnings"][-1].endswith("--strict lets them fail")
    assert "at worst 0.700" in invoke("compare", a, b, "--fail-below", "0.9", "--strict").stderr
    assert invoke("compare", a, b, "--fail-below", "0.5", "--strict").exit_code == 0


def test_a_slower_machine_lets_speed_ups_hold(measured: dict[str, Any], tmp_path: Path) -> None:
    a = saved(tmp_path / "a.json", measured)
    record = record_of(
        "compare", a, saved(tmp_path / "b.json", slowed(measured, 1, 3, factor=1.5)), "--fail-below", "0.9"
    )
    assert [row["verdict"] for row in record["rows"]] == ["passes", "in doubt"] * 2
    assert record["rows"][1]["doubt"] == "its speed-up over the baseline of the same run has 1.000 of A's"
    all_slower = invoke("compare", a, saved(tmp_path / "c.json", measured, speed=0.7), "--fail-below", "0.9")
    assert "in 2 of 4 cases" in all_slower.stderr  # the uncached ones: no busy machine, ceilings as before


def test_a_faster_baseline_alone_fails_nothing(measured: dict[str, Any], tmp_path: Path) -> None:
    a = saved(tmp_path / "a.json", measured)
    better = slowed(slowed(measured, 0, 2, factor=0.5), 1, 3, factor=1.0, speedup=1.0)
    record = record_of("compare", a, saved(tmp_path / "b.json", better), "--fail-below", "0.9", "--strict")
    assert [row["speedup_ratio"] for row in record["rows"]] == [None, 0.5, None, 0.5]


def test_few_slow_samples_are_noise(measured: dict[str, Any], tmp_path: Path) -> None:
    disturbed, once = copy.deepcopy(measured), copy.deepcopy(measured)
    disturbed["rows"][0]["latency_ms"] = latency_summary([98.0, 99.0, 150.0, 160.0, 170.0])
    once["rows"][0]["latency_ms"] = latency_summary([150.0])
    a = saved(tmp_path / "a.json", measured)
    for name, changed, doubt in (
        ("b", disturbed, "B's fastest sample has 1.000 of the speed of A's"),
        ("c", once, "one sample tells nothing of noise"),
    ):
        row = record_of("compare", a, saved(tmp_path / f"{name}.json", changed), "--fail-below", "0.9")["rows"][0]
        assert (row["verdict"], row["doubt"]) == ("in doubt", doubt)


def test_warnings_of_both_records_are_shown(measured: dict[str, Any], tmp_path: Path) -> None:
    noisy = noise_warnings({"a case": np.array([[10.0], [30.0], [40.0]])})
    assert noisy[0].startswith(BUSY)
    a = saved(tmp_path / "a.json", measured, warnings=["outliers somewhere"])
    b = saved(tmp_path / "b.json", measured, warnings=noisy)
    result = invoke("compare", a, b)
    for text in (" ".join(result.stderr.split()), " ".join(result.stdout.split("What differs")[0].split())):
        assert "a.json: outliers somewhere" in text
        assert "b.json: machine busy" in text
    assert record_of("compare", a, b)["warnings"] == [f"{a}: outliers somewhere", f"{b}: {noisy[0]}"]


def test_what_differs_is_named_machine_first(measured: dict[str, Any], tmp_path: Path) -> None:
    other = {
        "env": measured["env"] | {"torch": "2.11.0", "cpu": "another"},
        "args": measured["args"] | {"seed": 3, "output_json": "elsewhere"},
    }
    a, b = saved(tmp_path / "a.json", measured), saved(tmp_path / "b.json", measured, **other)
    differences = record_of("compare", a, b)["differences"]
    assert [row["setting"] for row in differences] == ["env.torch", "env.cpu", "args.seed"]
    output = invoke("compare", a, b).stdout
    assert output.index("env.torch") < output.index("history_length 16")


def test_commit_and_choices_that_differ_are_named(measured: dict[str, Any], tmp_path: Path) -> None:
    def record(name: str, commit: str, append: str, looked_up: str, **changes: Any) -> Path:
        parts = {
            "env": measured["env"] | {"git_commit": commit},
            "append": {"name": append, "reason": "auto"},
            "embeddings": [{"name": looked_up, "reason": "as requested"}],
            "kv_cache": {"append_impl": append, "evictions": len(commit)},
        }
        return saved(tmp_path / f"{name}.json", measured, **parts | changes)

    a = record("a", "1234", "native", "torch", dropout=0.2, full_sequence=True, ceilings=CEILINGS)
    b = record("b", "123456", "torch", "torchrec", dropout=0.0, full_sequence=False, ceilings=SLOW_CEILINGS)
    found = {row["setting"]: (row["a"], row["b"]) for row in record_of("compare", a, b)["differences"]}
    assert found == {
        "env.git_commit": ("1234", "123456"),
        "embeddings.0.name": ("torch", "torchrec"),
        "append.name": ("native", "torch"),
        "kv_cache.append_impl": ("native", "torch"),
        "dropout": (0.2, 0.0),
        "full_sequence": (True, False),
        "ceilings.bytes_per_s": (2e10, 1e10),
    }


def test_an_invalid_record_is_compared_with_a_warning(measured: dict[str, Any], tmp_path: Path) -> None:
    a = saved(tmp_path / "a.json", measured)
    b = saved(tmp_path / "b.json", measured, status="invalid", reasons=["interrupted"], rows=measured["rows"][:1])
    result = invoke("compare", a, b, "--format", "json")
    assert "b.json is invalid: interrupted" in " ".join(result.stderr.split())
    assert len(json.loads(result.stdout)["rows"]) == 1


def test_with_a_bar_to_clear_only_whole_valid_records_pass(measured: dict[str, Any], tmp_path: Path) -> None:
    a = saved(tmp_path / "a.json", measured)
    wrong = saved(tmp_path / "wrong.json", measured, status="invalid", reasons=["output wrong"])
    part = saved(tmp_path / "part.json", measured, rows=measured["rows"][:2])
    assert "cannot be judged" in invoke("compare", a, wrong, "--fail-below", "0.1").stderr
    assert "B lacks 2 of A's cases" in invoke("compare", a, part, "--fail-below", "0.1").stderr
    assert [invoke("compare", a, b, "--fail-below", "0.1").exit_code for b in (wrong, part, a)] == [1, 1, 0]
    record = record_of("compare", a, part)
    assert [len(record[name]) for name in ("rows", "only_in_a", "only_in_b")] == [2, 2, 0]


def test_implementations_and_tiers_can_be_compared(measured: dict[str, Any], tmp_path: Path) -> None:
    a = saved(tmp_path / "a.json", measured)
    rows = [row | {"impl": "other", "cache_tier": row["cache_tier"] and "host"} for row in measured["rows"]]
    b = saved(tmp_path / "b.json", measured, rows=rows)
    assert len(record_of("compare", a, b)["rows"]) == 4
    several = saved(tmp_path / "c.json", measured, rows=[*rows, *(row | {"impl": "third"} for row in rows)])
    assert "no measured case in common" in invoke("compare", a, several).stderr


def test_tiers_alone_can_be_compared(measured: dict[str, Any], tmp_path: Path) -> None:
    """Uncached rows have no tier, and are paired all the same; speed-ups are over one and the same baseline."""
    a = saved(tmp_path / "a.json", measured)
    assert [row["cache_tier"] for row in measured["rows"]] == [None, "device"] * 2
    on_host = copy.deepcopy(measured)
    for row in on_host["rows"]:
        row["cache_tier"] = row["cache_tier"] and "host"
    b = saved(tmp_path / "b.json", on_host)
    for one, other in ((a, b), (b, a)):
        record = record_of("compare", one, other, "--fail-below", "0.99")
        assert [row["case"].split(", ")[2] for row in record["rows"]] == [f"cached_length {n}" for n in (0, 8, 0, 16)]
        assert not any("cache_tier" in row["case"] for row in record["rows"])
        assert (record["only_in_a"], record["only_in_b"]) == ([], [])
        assert record["rows"][1]["speedup_ratio"] == 1.0


def test_speed_ups_over_unlike_baselines_have_no_ratio(measured: dict[str, Any], tmp_path: Path) -> None:
    other = slowed(measured, 1, 3, factor=0.5, speedup=1.5)
    for row in other["rows"]:
        row["impl"] = "other"
    record = record_of("compare", saved(tmp_path / "a.json", measured), saved(tmp_path / "b.json", other))
    assert [(row["a_speedup"], row["b_speedup"], row["speedup_ratio"]) for row in record["rows"][1::2]] == [
        (2.0, 1.5, None)
    ] * 2


def test_embeddings_are_told_apart_and_can_be_compared(measured: dict[str, Any], tmp_path: Path) -> None:
    def record(name: str, *embeddings: str, impl: str = "blocked") -> Path:
        rows = [row | {"embedding": embedding, "impl": impl} for embedding in embeddings for row in measured["rows"]]
        return saved(tmp_path / f"{name}.json", measured, rows=rows)

    both = record("both", "torch", "torchrec")
    assert len(record_of("compare", both, record("other", "torch", "torchrec", impl="other"))["rows"]) == 8
    one = record_of("compare", both, record("one", "torchrec"))
    assert [row["case"].count("embedding torchrec") for row in one["rows"]] == [1] * 4
    assert len(one["only_in_a"]) == 4
    assert len(record_of("compare", record("a", "torch"), record("b", "torchrec"))["rows"]) == 4
    assert "no measured case in common" in invoke("compare", both, record("c", "dynamicemb")).stderr


def test_records_of_infer_are_one_case(tmp_path: Path) -> None:
    path = tmp_path / "infer.json"
    record_of("infer", "--config", "tiny", "--steps", "2", "--output-json", path)
    rows = record_of("compare", path, path)["rows"]
    assert [(row["case"], row["speed_ratio"]) for row in rows] == [("infer", 1.0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not a JSON file"),
        ("[]", "must hold a JSON object"),
        ("{}", "is no record of hstu"),
        ('{"command": "infer", "schema_version": 9}', "schema_version 9"),
        ('{"command": "infer", "schema_version": 1, "rows": 5}', "is damaged"),
        ('{"command": "infer", "schema_version": 1, "rows": null}', "is damaged"),
        ('{"command": "infer", "schema_version": 1, "rows": [5], "reasons": null}', "is damaged"),
        ('{"command": "infer", "schema_version": 1, "latency_ms": {"p50": "abc"}}', "is damaged"),
        ('{"command": "infer", "schema_version": 1, "warnings": 5}', "its warnings are no list"),
        (
            '{"command": "bench-e2e", "schema_version": 1, "rows": '
            '[{"latency_ms": {"p50": 1}, "speedup_vs_baseline": 1, "speedup_range": [1]}]}',
            "is damaged",
        ),
    ],
)
def test_files_that_are_no_records_are_refused(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    assert message in failure_of(4, "compare", path, path)


def test_records_that_cannot_be_compared(measured: dict[str, Any], tmp_path: Path) -> None:
    a = saved(tmp_path / "a.json", measured)
    other = saved(tmp_path / "b.json", measured, command="bench-e2e")
    assert "compare the same command" in failure_of(2, "compare", a, other)
    nothing = saved(tmp_path / "c.json", measured, rows=[])
    assert invoke("compare", a, nothing).exit_code == 1
    before = a.read_text()
    assert "names a record that is compared" in failure_of(
        2, "compare", a, a, "--output-json", tmp_path / "." / "a.json"
    )
    assert a.read_text() == before
    assert "give both" in failure_of(2, "compare", a, a, "--strict")
