"""Runs on a machine with a GPU what no other machine can: the gpu tests, then the benchmarks with their records.

    python benchmarks/gpu_check.py            # everything, under ten minutes a part
    python benchmarks/gpu_check.py --part e2e

Records go to benchmarks/results/<device>/. A part that fails does not stop the others; the exit code says so.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

REPOSITORY = Path(__file__).parent.parent


def commands(device: str, results: Path) -> dict[str, list[str]]:
    """What to run, by the name of the part."""
    hstu = [sys.executable, "-m", "hstu_cli"]

    def record(name: str) -> list[str]:
        return ["--device", device, "--output-json", str(results / f"{name}.json")]

    return {
        "tests": [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"],
        "layer": [*hstu, "bench-layer", "--num-iters", "20", "--num-iters-warmup", "3", *record("bench-layer")],
        "layer-host": [
            *hstu, "bench-layer", "--history", "4096", "--cache-tier", "host", *record("bench-layer-host"),
        ],
        "layer-eager": [
            *hstu, "bench-layer", "--history", "4096", "--cached", "0,31/32", "--compare", "eager",
            *record("bench-layer-eager"),
        ],
        "fused": [*hstu, "bench-fused", "--num-iters", "20", "--num-iters-warmup", "3", *record("bench-fused")],
        "fused-layers": [*hstu, "bench-fused", "3", "--seqlens", "4096", *record("bench-fused-3-layers")],
        "e2e": [*hstu, "bench-e2e", "--num-iters", "10", *record("bench-e2e")],
    }  # fmt: skip


def device_folder() -> Path:
    """The folder of this GPU's results, named after it."""
    from hstu_cli.backend import open_device

    name = open_device("auto").backend.device_name
    return REPOSITORY / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main(
    device: Annotated[str, typer.Option(help="As in hstu --device.")] = "cuda",
    part: Annotated[list[str] | None, typer.Option(help="Run this part alone; repeatable.")] = None,
) -> None:
    """Run the parts in order, each with its own time and exit code."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, str(REPOSITORY))
    results = device_folder()
    results.mkdir(parents=True, exist_ok=True)
    parts = commands(device, results)
    unknown = set(part or ()) - set(parts)
    if unknown:
        raise typer.BadParameter(f"there is no part {', '.join(sorted(unknown))}; choose from {', '.join(parts)}")
    codes = {}
    for name in part or parts:
        start = time.monotonic()
        print(f"== {name}: {' '.join(parts[name][1:])}", flush=True)
        codes[name] = subprocess.run(parts[name], cwd=REPOSITORY, check=False).returncode
        print(f"== {name}: exit code {codes[name]} after {time.monotonic() - start:.0f} s", flush=True)
    raise typer.Exit(max(codes.values(), default=0))


if __name__ == "__main__":
    typer.run(main)
