"""Builds the C++ operators once per machine, torch and compiler, loads them, and knows why it cannot."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "src"
UNITS = ("ops.cpp", "training_ops.cpp")
"""What is compiled, side by side; all else are headers of these."""

LIBRARY = "hstu_native.so"
FAILURE = "failure.txt"
COMPILERS = ("g++", "c++", "clang++")
BUILD_SECONDS = 600
"""A compiler that takes longer is taken to hang."""

CACHE_VARIABLE, FLAGS_VARIABLE = "HSTU_KERNEL_CACHE", "HSTU_KERNEL_CXXFLAGS"


@dataclass(frozen=True, slots=True)
class NativeState:
    """Whether the operators can run here.

    available: they are loaded, or (built is False) nothing is known to stand against building them.
    reason: as a clause; where they are not available it says what is missing and how to get it.
    """

    available: bool
    built: bool
    reason: str


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How to build, and the folder whose name stands for all that the result depends on."""

    compiler: str
    compile_flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    folder: Path

    @property
    def library(self) -> Path:
        return self.folder / LIBRARY

    @property
    def failure(self) -> Path:
        return self.folder / FAILURE


class _Unavailable(Exception):  # noqa: N818, it ends a search rather than a run
    """Why the operators cannot be built here."""


_lock = threading.Lock()
_state: NativeState | None = None  # of an attempt; where none was made yet, every question looks again


def native_state(*, build: bool = True, retry: bool = False) -> NativeState:
    """Load the operators, building them first where that is needed; the answer of an attempt is kept.

    build: False only looks whether they are built or could be. retry: try again what failed before.
    """
    global _state
    with _lock:
        if _state is None or (retry and not _state.available):
            state = _find(build=build, retry=retry)
            if not build and not state.built:
                return state
            _state = state
        return _state


def cache_folder() -> Path:
    """Where builds are kept: $HSTU_KERNEL_CACHE, else hstu/kernels in the user's cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "hstu" / "kernels"


def _find(*, build: bool, retry: bool) -> NativeState:
    try:
        recipe = _recipe()
        if not recipe.library.exists():
            if not build and not recipe.failure.exists():
                return NativeState(True, False, "built at first use, or by hstu env --build-kernels")
            _build(recipe, retry=retry)
        torch.ops.load_library(str(recipe.library))
    except _Unavailable as error:
        return NativeState(False, False, str(error))
    except OSError as error:
        return NativeState(
            False, False, f"the native kernels cannot be stored or loaded ({error}); see {CACHE_VARIABLE}"
        )
    return NativeState(True, True, "built for this CPU" + _tile_note())


def _tile_note() -> str:
    units = torch.ops.hstu_native.bf16_tile_units()
    return f", bf16 tiles in {units}" if units else ""


def _recipe() -> _Recipe:
    """Look at this machine; _Unavailable where nothing can be built."""
    if sys.platform != "linux":
        raise _Unavailable(f"the native kernels build on Linux alone, not on {platform.system()}")
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False, timeout=60)
    if version.returncode != 0:
        raise _Unavailable(f"{compiler} --version fails; install another compiler (apt install g++)")
    torch_folder = Path(torch.__file__).parent
    capability = torch.backends.cpu.get_cpu_capability()
    compile_flags = (
        "-std=c++20", "-O3", _cpu_flag(), "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math",
        *_vector_flags(capability),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", "-DAT_PER_OPERATOR_HEADERS",
        f"-isystem{torch_folder}/include", f"-isystem{torch_folder}/include/torch/csrc/api/include",
        *os.environ.get(FLAGS_VARIABLE, "").split(),
    )  # fmt: skip
    # No OpenMP library here: the one that torch has loaded must be it (src/threads.h).
    link_flags = ("-shared", f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_folder}/lib")
    key = hashlib.sha256()
    for part in (
        torch.__version__, compiler, version.stdout, *compile_flags, *link_flags, _cpu_features(),
        *(path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir())),
    ):  # fmt: skip
        key.update(part.encode() + b"\0")
    return _Recipe(compiler, compile_flags, link_flags, cache_folder() / key.hexdigest()[:24])


def _compiler() -> str:
    chosen = os.environ.get("CXX")
    if chosen and shutil.which(chosen) is None:
        raise _Unavailable(f"CXX names {chosen!r}, which is no program here")
    found = shutil.which(chosen) if chosen else next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        raise _Unavailable("there is no C++ compiler; install one (apt install g++)")
    return found


def _cpu_flag() -> str:
    """Code for this very CPU, as both g++ and clang spell it: on Arm clang knows no `-march=native`."""
    return "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"


def _vector_flags(capability: str) -> tuple[str, ...]:
    """What torch's vector headers need to be told; all else, Arm too (NEON), is plain to them.

    capability: of torch.backends.cpu. Arm's SVE256 and SVE128 count as plain: their vectors have no fixed size here.
    """
    if capability == "AVX512":
        # Compilers prefer shorter vectors on most CPUs that have these; the kernels do not.
        return ("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512", "-mprefer-vector-width=512")
    if capability == "AVX2":
        return ("-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2")
    return ("-DCPU_CAPABILITY=DEFAULT",)


def _cpu_features() -> str:
    """What code for this very CPU depends on: the processor and its instruction sets."""
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part", "isa")
    first: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in wanted:
            first.setdefault(name.strip(), value.strip())
    return platform.machine() + repr(sorted(first.items()))


def _build(recipe: _Recipe, *, retry: bool) -> None:
    """Compile into the recipe's folder, unless another process has or the same attempt failed before."""
    import fcntl  # not on every system

    recipe.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with Path(recipe.folder, "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system when a process dies
        if recipe.library.exists():
            return
        if recipe.failure.exists() and not retry:
            raise _Unavailable(_failed(recipe))
        started = time.monotonic()
        print("Building the native CPU kernels, once for this machine (half a minute) …", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=recipe.folder) as folder:
            _compile(recipe, Path(folder))
            Path(folder, LIBRARY).replace(recipe.library)
        recipe.failure.unlink(missing_ok=True)
        print(f"Built in {time.monotonic() - started:.0f} s: {recipe.library}", file=sys.stderr, flush=True)


def _compile(recipe: _Recipe, folder: Path) -> None:
    """Object files, then library; what the compiler says of a failure is kept beside where the library would be."""
    objects = [folder / f"{unit}.o" for unit in UNITS]
    compilations = [
        (recipe.compiler, *recipe.compile_flags, "-c", SOURCES / unit, "-o", target)
        for unit, target in zip(UNITS, objects, strict=True)
    ]
    with ThreadPoolExecutor(len(UNITS)) as pool:
        runs = [pool.submit(_run, recipe, command) for command in compilations]
    for run in runs:
        run.result()
    _run(recipe, (recipe.compiler, *_sanitizers(recipe), *objects, "-o", folder / LIBRARY, *recipe.link_flags))


def _run(recipe: _Recipe, command: tuple[str | Path, ...]) -> None:
    # What is preloaded into Python, such as a sanitizer's library, is not meant for the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, env=environment,
            timeout=BUILD_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _Unavailable(f"{recipe.compiler} did not end within {BUILD_SECONDS} s") from None
    if done.returncode < 0:  # killed, by the user or for lack of memory: the next start may fare better
        raise _Unavailable(f"{recipe.compiler} was killed by signal {-done.returncode}")
    if done.returncode > 0:
        recipe.failure.write_text(f"{' '.join(map(str, command))}\n{done.stderr}{done.stdout}", encoding="utf-8")
        raise _Unavailable(_failed(recipe))


def _sanitizers(recipe: _Recipe) -> list[str]:
    return [flag for flag in recipe.compile_flags if flag.startswith("-fsanitize")]


def _failed(recipe: _Recipe) -> str:
    return (
        f"{Path(recipe.compiler).name} could not build the native kernels, see {recipe.failure}; "
        "hstu env --build-kernels tries again"
    )
