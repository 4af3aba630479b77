"""The native operators by clang, for x86 without AVX, and for Arm as far as a cross compiler goes."""

import json
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_native import in_process

from hstu_cli.kernels.native import build

CLANG, CROSS_COMPILER = "clang++", "aarch64-linux-gnu-g++"

OPERATORS = """
import json, os, sys
sys.path.insert(0, "tests")
import torch
from test_attention import ATTENTION_CASES, make_inputs, oracle, run
from hstu_cli.kernels.attention.cases import AttentionCase

for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
    for case in ATTENTION_CASES:
        inputs = make_inputs(case, dtype)
        expected, bound = oracle(inputs)
        error = (run(inputs, "native").double() - expected).abs()
        assert (error <= bound).all(), (case.id, dtype)
inputs = make_inputs(AttentionCase((1500, 3), (40, 1), num_heads=2, head_dim=32), torch.float32)
tasks = {}
for num_threads in (1, 3):
    torch.set_num_threads(num_threads)
    run(inputs, "native")
    tasks[num_threads] = len(os.listdir("/proc/self/task"))
with open("/proc/self/maps") as maps:
    files = {line.split()[-1] for line in maps if "/" in line}
libraries = [file for file in files if os.path.basename(file).startswith(("libgomp", "libomp", "libiomp"))]
print(json.dumps({"more_threads": tasks[3] - tasks[1], "openmp": sorted(libraries)}))
"""


@pytest.mark.parametrize(
    "plain",
    [pytest.param(True, id="plain vectors"), pytest.param(False, id="this CPU", marks=pytest.mark.slow)],
)
def test_clang_builds_operators_that_are_right_on_the_threads_of_torch(tmp_path: Path, plain: bool) -> None:
    """Plain vectors: what a CPU gets of which torch knows no instructions, here x86 without AVX."""
    if shutil.which(CLANG) is None:
        pytest.skip(f"{CLANG} is not installed")
    environment = {"CXX": CLANG, build.CACHE_VARIABLE: str(tmp_path), "OMP_NUM_THREADS": "1"}
    if plain:
        flags = "-O1 -march=x86-64" if platform.machine() == "x86_64" else "-O1"
        environment |= {"ATEN_CPU_CAPABILITY": "default", build.FLAGS_VARIABLE: flags}
    done = in_process(OPERATORS, **environment)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert len(record["openmp"]) == 1, "clang's own OpenMP library has threads that torch knows nothing of"
    assert record["more_threads"] == 2


def for_machine(machine: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The flags that a compiler would get there."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    return build._recipe().compile_flags


@pytest.mark.native
def test_each_machine_has_its_flag_and_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "-march=native" in for_machine("x86_64", monkeypatch)
    folder = build._recipe().folder
    arm = for_machine("aarch64", monkeypatch)
    assert "-mcpu=native" in arm
    assert "-march=native" not in arm
    assert build._recipe().folder != folder


def test_sources_compile_for_arm_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which(CROSS_COMPILER) is None:
        pytest.skip(f"{CROSS_COMPILER} is not installed")
    monkeypatch.setenv("CXX", CROSS_COMPILER)
    flags = [flag for flag in for_machine("aarch64", monkeypatch) if flag != "-mcpu=native"]
    *first, last = (build.SOURCES / unit for unit in build.UNITS)  # as one: their headers take most of the time
    included = [part for unit in first for part in ("-include", unit)]
    command = [CROSS_COMPILER, *flags, "-Wall", "-Wextra", "-Werror", "-fsyntax-only", *included, last]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_loops_on_threads_are_our_own() -> None:
    """Without the compiler's OpenMP, torch's loop of headers alone would run on one thread and say nothing."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in build.SOURCES.iterdir()}
    assert "GOMP_parallel" in sources.pop("threads.h")
    assert [name for name, text in sources.items() if "at::parallel_" in text or "pragma omp parallel" in text] == []
