"""Compiles every configuration of every Triton kernel for every chip, and checks that it fits: no GPU is needed.

`python -m hstu_cli.kernels.triton.aot` prints shared memory, registers and spills of each; it ends with 1 where a
kernel does not compile or takes more shared memory than the chip has.
"""

import argparse
import importlib
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hstu_cli.kernels.triton.chips import CHIPS

MODULES = tuple(
    f"hstu_cli.kernels.{path.parent.name}.triton" for path in sorted(Path(__file__).parents[1].glob("*/triton.py"))
)
"""The operators' Triton kernels; each module has `aot_specs(chip) -> list[AotSpec]`."""

TENSOR_MEMORY_COLUMNS = 512
"""Of 128 rows of 32 bits, for each multiprocessor of chips that have it (100)."""


@dataclass(frozen=True, slots=True)
class AotSpec:
    """One compilation of a kernel.

    kernel: a function decorated with triton.jit. signature: the type of each argument that is no constexpr, such as
    "*bf16", "i32" or "fp32", by name. constexprs: the other arguments. label: the configuration, and what else varies.
    aligned: integer arguments that are multiples of 16, as sizes and strides mostly are; all pointers are taken so.
    max_registers: as in `LaunchConfig`.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    label: str
    aligned: tuple[str, ...] = field(default=())
    max_registers: int | None = None

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.__name__


@dataclass(frozen=True, slots=True)
class Compiled:
    """What came out for one chip.

    shared_bytes: for each block; registers, stack_bytes: for each thread, the stack being spilled registers;
    error: why it cannot run there, None where it can.
    """

    kernel: str
    chip: int
    label: str
    shared_bytes: int = 0
    registers: int = 0
    stack_bytes: int = 0
    error: str | None = None


def compile_spec(spec: AotSpec, chip: int) -> Compiled:
    """Compile for a chip of `CHIPS`; what Triton cannot compile, or the chip has no room for, has an error."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.errors import TritonError

    names = spec.kernel.arg_names
    signature = {name: spec.signature.get(name, "constexpr") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name in spec.aligned]
    source = ASTSource(
        fn=spec.kernel,
        signature=signature,
        constexprs=dict(spec.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "maxnreg": spec.max_registers}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    except (TritonError, RuntimeError) as error:
        return Compiled(spec.name, chip, spec.label, error=f"does not compile: {str(error).strip().splitlines()[-1]}")
    usage = _resource_usage(compiled.asm["cubin"])
    shared, limit = compiled.metadata.shared, CHIPS[chip] * 1024
    error = f"{shared} bytes of shared memory, and {limit} is the most" if shared > limit else None
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    if columns > TENSOR_MEMORY_COLUMNS:
        error = f"{columns} columns of tensor memory, and {TENSOR_MEMORY_COLUMNS} is the most"
    return Compiled(spec.name, chip, spec.label, shared, usage["REG"], usage["STACK"], error)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """What the cuobjdump that comes with Triton says of the only function in a binary: REG, STACK, ..."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", text)}


def specs_of(module: str, chip: int, *, kernels: str = "", first: bool = False) -> list[AotSpec]:
    """What to compile of one module for a chip: kernels whose name contains `kernels`; first: one of each kernel."""
    specs = [spec for spec in importlib.import_module(module).aot_specs(chip) if kernels in spec.name]
    return list({spec.name: spec for spec in reversed(specs)}.values()) if first else specs


def _compile_number(module: str, chip: int, kernels: str, first: bool, number: int) -> Compiled:
    """In a process of the pool, which makes the specs anew: compiled functions do not travel."""
    return compile_spec(specs_of(module, chip, kernels=kernels, first=first)[number], chip)


def table(rows: Iterable[Compiled]) -> str:
    """The results as aligned text, the failures last."""
    header = ("kernel", "chip", "configuration", "shared KB", "registers", "spilled bytes")
    rows = sorted(rows, key=lambda row: row.error is not None)
    cells = [header]
    for row in rows:
        figures = (f"{row.shared_bytes / 1024:.1f}", str(row.registers), str(row.stack_bytes))
        cells.append((row.kernel, str(row.chip), row.label, *figures))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    errors = [None, *(row.error for row in rows)]
    return "\n".join(f"{line}  FAILS: {error}" if error else line for line, error in zip(lines, errors, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m hstu_cli.kernels.triton.aot", description=__doc__)
    parser.add_argument("--module", action="append", help="a module with aot_specs (default: all operators')")
    parser.add_argument("--chip", type=int, choices=CHIPS, action="append", help="compute capability (default: all)")
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--first", action="store_true", help="one configuration of each kernel and chip")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions cannot be compiled
    work = [
        (module, chip, chosen.kernel, chosen.first, number)
        for module in chosen.module or MODULES
        for chip in chosen.chip or CHIPS
        for number in range(len(specs_of(module, chip, kernels=chosen.kernel, first=chosen.first)))
    ]
    if not work:
        parser.error(f"no kernel has {chosen.kernel!r} in its name")
    if chosen.jobs == 1:
        rows = list(itertools.starmap(_compile_number, work))
    else:
        with ProcessPoolExecutor(chosen.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows = list(pool.map(_compile_number, *zip(*work, strict=True)))
    print(table(rows))
    failures = sum(row.error is not None for row in rows)
    print(f"{len(rows)} compiled, {failures} of which do not fit or compile")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
