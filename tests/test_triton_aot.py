"""Triton kernels compiled ahead of time: every kernel for every chip, and what is said where one does not fit."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hstu_cli.kernels.triton.aot import MODULES, Compiled, table
from hstu_cli.kernels.triton.chips import CHIPS, nearest_chip

pytest.importorskip("triton", reason="triton is not installed")


def compile_kernels(*arguments: str, folder: Path) -> tuple[int, list[list[str]], str]:
    """Exit code, rows as words and last line of the command; modules in the folder can be named."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), environment.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "hstu_cli.kernels.triton.aot", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.stdout, done.stderr
    _, *rows, last = done.stdout.splitlines()
    return done.returncode, [row.split() for row in rows], last


def test_one_configuration_of_every_kernel_fits_every_chip(tmp_path: Path) -> None:
    exit_code, rows, last = compile_kernels("--first", "--jobs", "1", folder=tmp_path)
    assert exit_code == 0, rows
    kernels = {row[0] for row in rows}
    assert {"layer_norm_kernel", "linear_kernel", "finish_kernel", "hstu_attention_kernel"} <= kernels
    assert {(row[0], int(row[1])) for row in rows} == set(itertools.product(kernels, CHIPS))
    assert last == f"{len(rows)} compiled, 0 of which do not fit or compile"
    for row in rows:
        shared_kb, registers = float(row[-3]), int(row[-2])
        assert shared_kb <= CHIPS[int(row[1])]
        assert 16 <= registers <= 255
        assert shared_kb > 0 or row[0] != "linear_kernel"


SPECS = """
import triton
import triton.language as tl
from hstu_cli.kernels.triton.aot import AotSpec

@triton.jit
def transpose(x, out, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tl.store(out + i * N + j, tl.trans(tl.load(x + i * N + j)))

@triton.jit
def unfinished(x, out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), missing)

def aot_specs(chip):
    pointers = {"x": "*fp16", "out": "*fp16"}
    kernels = (transpose, 256), (transpose, 32), (unfinished, 32)
    return [AotSpec(kernel, pointers, {"N": size}, 8, 1, f"wide={size}") for kernel, size in kernels]
"""


def test_what_does_not_fit_or_compile_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "specs.py").write_text(SPECS)
    arguments = ("--module", "specs", "--chip", "80", "--chip", "89")
    exit_code, rows, last = compile_kernels(*arguments, "--kernel", "transpose", "--jobs", "2", folder=tmp_path)
    assert exit_code == 1
    assert last == "4 compiled, 1 of which do not fit or compile"
    assert [row[1:3] for row in rows] == [["80", "wide=256"], ["80", "wide=32"], ["89", "wide=32"], ["89", "wide=256"]]
    assert " ".join(rows[-1]).endswith("FAILS: 131072 bytes of shared memory, and 101376 is the most")
    exit_code, rows, last = compile_kernels(*arguments, "--kernel", "unfinished", "--jobs", "1", folder=tmp_path)
    assert exit_code == 1
    assert last == "2 compiled, 2 of which do not fit or compile"
    assert all("missing is not defined" in " ".join(row) for row in rows)


def test_the_table_ends_with_the_failures() -> None:
    rows = [
        Compiled("a", 80, "M=64", error="it does not compile"),
        Compiled("long_name", 100, "M=64 N=64", 2048, 255, 16),
    ]
    header, fits, fails = table(rows).splitlines()
    assert header.split() == ["kernel", "chip", "configuration", "shared", "KB", "registers", "spilled", "bytes"]
    assert fits.split() == ["long_name", "100", "M=64", "N=64", "2.0", "255", "16"]
    assert fails.split() == ["a", "80", "M=64", "0.0", "0", "0", "FAILS:", "it", "does", "not", "compile"]
    assert header.index("registers") == fits.index("255") == fails.index("0", fails.index("0.0") + 3)


def test_every_operator_with_a_kernel_is_compiled() -> None:
    operators = ("append_pages", "attention", "linear", "norm", "paged_attention")
    assert {f"hstu_cli.kernels.{operator}.triton" for operator in operators} <= set(MODULES)


@pytest.mark.parametrize(
    ("capability", "chip"),
    [((8, 0), 80), ((8, 6), 89), ((8, 9), 89), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((12, 0), 120)],
    ids=str,
)
def test_chips_stand_for_their_generation(capability: tuple[int, int], chip: int) -> None:
    assert nearest_chip(capability) == chip
