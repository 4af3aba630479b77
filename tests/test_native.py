"""The native operators beyond their cases: threads, odd shapes, and building them or not."""

import dataclasses
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cli import failure_of, record_of
from test_attention import oracle, run
from test_paged_attention import oracle as paged_oracle
from test_paged_attention import run as run_paged

from hstu_cli.errors import UnavailableError, UsageError
from hstu_cli.kernels.attention.cases import AttentionCase, make_inputs
from hstu_cli.kernels.dispatch import choose_impl
from hstu_cli.kernels.native import build
from hstu_cli.kernels.paged_attention.cases import PagedCase, make_paged_inputs

TINY_BENCH = ("bench-layer", "--config", "tiny", "--history", 8, "--candidates", 0, "--batch-size", 1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.native
@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_is_right_and_repeats_itself(threads, num_threads: int, dtype: torch.dtype) -> None:
    # One head and few rows: only by sharing the keys do the threads all have work.
    threads(num_threads)
    inputs = make_inputs(AttentionCase((1500, 3), (40, 1), num_heads=1, head_dim=32), dtype)
    output = run(inputs, "native")
    expected, bound = oracle(inputs)
    assert ((output.double() - expected).abs() <= bound).all()
    assert all(torch.equal(run(inputs, "native"), output) for _ in range(3))


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_candidates_than_a_task_has_rows_and_no_history(dtype: torch.dtype) -> None:
    for history, candidates in (((0,), (600,)), ((0, 700, 0), (1030, 2, 513))):
        inputs = make_inputs(AttentionCase(history, candidates, head_dim=64), dtype)
        expected, bound = oracle(inputs)
        assert ((run(inputs, "native").double() - expected).abs() <= bound).all()


@pytest.mark.native
@pytest.mark.parametrize("num_threads", [1, 4])
def test_few_rows_over_many_pages(threads, num_threads: int) -> None:
    threads(num_threads)
    case = PagedCase(AttentionCase((2100, 5), (3, 0), num_heads=1, head_dim=64), (2098, 4), 7)
    inputs = make_paged_inputs(case, torch.bfloat16)
    output, expected = run_paged(inputs, "native"), paged_oracle(inputs)
    assert (output.double() - expected).norm() <= 0.005 * expected.norm()
    assert all(torch.equal(run_paged(inputs, "native"), output) for _ in range(3))


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 3, 8, 31, 33, 96, 160, 257])
def test_any_width_of_a_head(head_dim: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(AttentionCase((70, 1), (3, 2), num_heads=2, head_dim=head_dim), dtype)
    expected, bound = oracle(inputs)
    assert ((run(inputs, "native").double() - expected).abs() <= bound).all()


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_far_from_zero(dtype: torch.dtype) -> None:
    inputs = make_inputs(AttentionCase((40,), (3,), num_heads=1, head_dim=16), dtype)
    inputs.q.mul_(60)  # scores of several hundred to either side, where exp leaves its range
    expected, bound = oracle(inputs)
    output = run(inputs, "native")
    assert ((output.double() - expected).abs() <= bound).all()


@pytest.mark.native
@settings(max_examples=60)
@given(data=st.data())
def test_any_batch_over_pages(data: st.DataObject) -> None:
    sequence = st.tuples(st.integers(0, 700), st.integers(0, 40), st.floats(0, 1))
    sequences = data.draw(st.lists(sequence, min_size=1, max_size=4), "history, candidates, share that is cached")
    whole = AttentionCase(
        tuple(history for history, _, _ in sequences),
        tuple(candidates for _, candidates, _ in sequences),
        num_heads=data.draw(st.sampled_from([1, 2, 5, 18]), "heads"),
        head_dim=data.draw(st.sampled_from([16, 40, 64]), "head_dim"),
    )
    case = PagedCase(whole, tuple(int(history * share) for history, _, share in sequences), 16)
    inputs = make_paged_inputs(case, data.draw(st.sampled_from(DTYPES), "dtype"))
    before = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.integers(1, 3), "threads"))
    try:
        output = run_paged(inputs, "native")
    finally:
        torch.set_num_threads(before)
    expected, bound = oracle(inputs.whole)
    error = (output.double() - expected[inputs.new_rows]).abs()
    assert (error <= bound[inputs.new_rows]).all()


@pytest.mark.native
@pytest.mark.parametrize("num_threads", [1, 3])
def test_sequences_are_computed_as_if_they_were_alone(threads, num_threads: int) -> None:
    # Together their packed keys pass what is held at a time, so they come in groups; one of them is too short for that.
    threads(num_threads)
    lengths = (513, 600, 700, 20) + (520,) * 20
    inputs = make_inputs(AttentionCase(lengths, (3,) * len(lengths), num_heads=4, head_dim=256), torch.bfloat16)
    together = run(inputs, "native")
    for (start, end), num_candidates in zip(
        pairwise(inputs.seq_offsets.tolist()), inputs.num_candidates.split(1), strict=True
    ):
        q, k, v = (x[start:end] for x in (inputs.q, inputs.k, inputs.v))
        alone = dataclasses.replace(
            inputs, q=q, k=k, v=v, seq_offsets=torch.tensor([0, end - start]), num_candidates=num_candidates
        )
        expected = run(alone, "native")
        if num_threads == 1:
            assert torch.equal(together[start:end], expected)
        else:  # tasks may share rows by keys in the one run and not in the other
            difference = (together[start:end].float() - expected.float()).norm()
            assert difference <= torch.finfo(torch.bfloat16).eps / 2 * expected.float().norm()


@pytest.mark.native
def test_heads_are_computed_as_if_they_were_alone(threads) -> None:
    # Packed, the keys of a long sequence's heads pass what is held at a time, so that its heads come in groups.
    threads(1)
    inputs = make_inputs(AttentionCase((1100, 40, 1030), (3, 0, 1), num_heads=16, head_dim=256), torch.bfloat16)
    together = run(inputs, "native")
    for head in (0, 1, 6, 7, 15):
        q, k, v = (x[:, head : head + 1] for x in (inputs.q, inputs.k, inputs.v))
        assert torch.equal(together[:, head : head + 1], run(dataclasses.replace(inputs, q=q, k=k, v=v), "native"))


@pytest.mark.native
def test_keys_of_pages_and_new_ones_whose_heads_lie_differently(threads) -> None:
    # 32 keys at a time, half of them in pages: as far apart as the new ones, whose heads are one and the same memory.
    threads(1)
    case = PagedCase(AttentionCase((68,), (1,), num_heads=2, head_dim=64), (48,), 16)
    inputs = make_paged_inputs(case, torch.bfloat16)
    between = torch.full_like(inputs.new.k[:, :1], 100.0)
    shared = torch.cat([inputs.new.k[:, :1], between], 2)[..., :64].expand(-1, 2, -1)
    assert shared.stride() == (128, 0, 1)
    new = dataclasses.replace(inputs.new, k=shared)
    copied = dataclasses.replace(inputs.new, k=shared.contiguous())
    found, expected = (run_paged(dataclasses.replace(inputs, new=n), "native") for n in (new, copied))
    assert torch.equal(found, expected)


EMULATED = f"-D__AMX_BF16__ -D__AMX_TILE__ -include {Path(__file__).parent}/support/emulated_tiles.h"


@pytest.mark.native
@pytest.mark.skipif("avx512_bf16" not in build._cpu_features(), reason="a CPU without AVX-512 BF16")
@pytest.mark.parametrize(
    ("units", "flags"), [("vectors", "-mno-amx-bf16 -mno-amx-tile"), ("matrix units", EMULATED)], ids=["vectors", "amx"]
)
def test_bf16_tiles_in_the_units_that_this_cpu_does_not_use(units: str, flags: str) -> None:
    if torch.ops.hstu_native.bf16_tile_units() == units:
        pytest.skip(f"every test of bf16 is one of {units} here")
    files = ("attention", "paged_attention", "linear", "norm_linear", "layer", "attention_gradients", "native_training")
    code = (
        "import pytest, torch\n"
        f"files = ['tests/test_%s.py' % name for name in {files}]\n"
        "assert pytest.main(['-q', '-k', 'native and (bfloat16 or products or columns)', *files]) == 0\n"
        f"assert torch.ops.hstu_native.bf16_tile_units() == '{units}'\n"
    )
    done = in_process(code, **{build.FLAGS_VARIABLE: flags})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.native
def test_bf16_without_tiles() -> None:
    code = (
        "import torch, sys; sys.path.insert(0, 'tests')\n"
        "from test_attention import *\n"
        "for case in ATTENTION_CASES:\n"
        "    inputs = make_inputs(case, torch.bfloat16)\n"
        "    expected, bound = oracle(inputs)\n"
        "    assert ((run(inputs, 'native').double() - expected).abs() <= bound).all(), case.id\n"
        "assert not torch.ops.hstu_native.has_bf16_tiles()\n"
    )
    done = in_process(code, ONEDNN_MAX_CPU_ISA="AVX2")
    assert done.returncode == 0, done.stderr


def test_native_is_for_cpus() -> None:
    with pytest.raises(UsageError, match="runs on a CPU, not on cuda"):
        choose_impl("native", "cuda")
    assert choose_impl("auto", "cuda").name != "native"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and no attempt made yet; nothing may succeed here, for a library loads once in a process."""
    monkeypatch.setattr(build, "_state", None)
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "kernels"))
    return tmp_path


def compiler(folder: Path, *body: str) -> Path:
    """A program that says its version, notes each other call in `calls`, and then does what body says."""
    path = folder / "compiler"
    lines = ("#!/bin/sh", '[ "$1" = --version ] && echo fake 1.0 && exit', f"echo call >> {folder}/calls", *body)
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)
    return path


def num_calls(folder: Path) -> int:
    return len((folder / "calls").read_text().splitlines())


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [("PATH", "", r"no C\+\+ compiler.*apt install g\+\+"), ("CXX", "nonexistent", "'nonexistent'")],
)
def test_without_a_compiler(fresh, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(variable, value)
    choice = choose_impl("auto", "cpu")
    assert choice.name == "blocked"
    with pytest.raises(UnavailableError, match=message):
        choose_impl("native", "cpu")
    assert choice.reason.removeprefix("auto: ") in failure_of(3, *TINY_BENCH, "--impl", "native")
    assert record_of(*TINY_BENCH, "--num-iters", 1)["device"]["impl"] == "blocked"
    record = record_of("env")
    assert record["native"] == {"available": False, "built": False, "reason": choice.reason.removeprefix("auto: ")}
    assert "--build-kernels" in failure_of(3, "env", "--build-kernels")


def test_a_failed_build_is_remembered(fresh, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("CXX", str(compiler(fresh, "echo no such header >&2", "exit 1")))
    assert build.native_state(build=False).available  # nothing is known against it yet
    for _ in range(2):
        monkeypatch.setattr(build, "_state", None)
        state = build.native_state()
        assert not state.available
        assert "hstu env --build-kernels tries again" in state.reason
    assert num_calls(fresh) == len(build.UNITS)
    assert not build.native_state(build=False).available
    [log] = (fresh / "kernels").rglob(build.FAILURE)
    assert "no such header" in log.read_text()
    assert capsys.readouterr().err.count("Building the native") == 1
    build.native_state(retry=True)
    assert num_calls(fresh) == 2 * len(build.UNITS)


def test_a_killed_build_is_not_remembered(fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler(fresh, "kill -KILL $$")))
    for _ in range(2):
        monkeypatch.setattr(build, "_state", None)
        assert "killed by signal 9" in build.native_state().reason
    assert num_calls(fresh) == 2 * len(build.UNITS)


def test_a_cache_that_cannot_be_written(fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "file").touch()
    monkeypatch.setenv("CXX", str(compiler(fresh)))
    monkeypatch.setenv(build.CACHE_VARIABLE, str(fresh / "file"))
    assert build.CACHE_VARIABLE in build.native_state().reason


def test_what_a_build_depends_on_names_its_folder(fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler(fresh)))
    folders = {build._recipe().folder}
    with monkeypatch.context() as patch:
        patch.setenv(build.FLAGS_VARIABLE, "-g")
        folders.add(build._recipe().folder)
    with monkeypatch.context() as patch:
        patch.setattr(build, "_cpu_features", lambda: "another CPU")
        folders.add(build._recipe().folder)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99")
        folders.add(build._recipe().folder)
    assert len(folders) == 4


@pytest.mark.native
def test_two_processes_build_once(tmp_path: Path) -> None:
    """The compiler here takes a second to hand out the library that is built already."""
    library = build._recipe().library
    fake = compiler(tmp_path, "sleep 1", f'for last; do [ "$out" = 1 ] && cp {library} "$last"; out=0',
                    '  [ "$last" = -o ] && out=1; done', "true")  # fmt: skip
    code = (
        "import json, torch\n"
        "from hstu_cli.kernels.attention.cases import *\n"
        "from hstu_cli.kernels.dispatch import choose_impl\n"
        "from test_attention import run\n"
        "run(make_inputs(ATTENTION_CASES[5], torch.float32), 'native')\n"
        "print(json.dumps(choose_impl('auto', 'cpu').name))\n"
    )
    environment = {
        **os.environ, "CXX": str(fake), build.CACHE_VARIABLE: str(tmp_path / "kernels"),
        "PYTHONPATH": os.pathsep.join((os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent))),
    }  # fmt: skip
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        for _ in range(2)
    ]
    results = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], results
    assert all(json.loads(out) == "native" for out, _ in results)
    assert num_calls(tmp_path) == len(build.UNITS) + 1  # object files, one library
    assert sum(b"Built in" in err for _, err in results) == 1
    left = {path.name for path in (tmp_path / "kernels").rglob("*") if path.is_file()}
    assert left == {"lock", build.LIBRARY}
