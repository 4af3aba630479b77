"""`hstu compare`: two saved records side by side."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from support.cli import failure_of, invoke, record_of


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A real record, and what `compare` needs of it."""
    path = tmp_path_factory.mktemp("records") / "a.json"
    arguments = ["--config", "tiny", "--history", "16,32", "--cached", "1/2", "--candidates", "0", "--batch-size", "1"]
    return record_of("bench-layer", *arguments, "--num-iters", "2", "--output-json", path)


def saved(path: Path, record: dict[str, Any], speed: float = 1.0, **changes: Any) -> Path:
    """The record with every latency divided by `speed`."""
    changed = copy.deepcopy(record) | changes
    for row in changed["rows"]:
        row["latency_ms"]["p50"] /= speed
    path.write_text(json.dumps(changed))
    return path


def test_ratios_are_speeds_of_the_second(measured: dict[str, Any], tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a.json", measured), saved(tmp_path / "b.json", measured, speed=1.25)
    record = record_of("compare", a, b, "--fail-below", "1.2")
    assert record["compared"] == "bench-layer"
    assert record["differences"] == []
    assert [row["speed_ratio"] for row in record["rows"]] == pytest.approx([1.25] * 4)
    assert record["rows"][1]["case"].startswith("batch_size 1, history_length 16, cached_length 8")


def test_a_slow_case_fails_and_is_named(measured: dict[str, Any], tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a.json", measured), saved(tmp_path / "b.json", measured)
    slow = json.loads(b.read_text())
    slow["rows"][2]["latency_ms"]["p50"] *= 2
    b.write_text(json.dumps(slow))
    result = invoke("compare", a, b, "--fail-below", "0.9", "--format", "json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["status"] == "invalid"
    assert "in 1 of 4 cases, at worst 0.500 in batch_size 1, history_length 32" in result.stderr
    assert invoke("compare", a, b).exit_code == 0


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
