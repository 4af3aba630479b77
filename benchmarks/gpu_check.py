"""Runs on a machine with a GPU what no other machine can: the gpu tests, then the benchmarks with their records.

    python benchmarks/gpu_check.py            # everything, under ten minutes a part
    python benchmarks/gpu_check.py --part e2e
    python benchmarks/gpu_check.py --device cpu --quick --results /some/folder   # only to see that every part starts

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

QUICK = {
    "layer": ["--config", "tiny", "--history", "16", "--batch-size", "1", "--num-iters", "1"],
    "layer-host": ["--config", "tiny", "--history", "16", "--batch-size", "1", "--num-iters", "1"],
    "layer-eager": ["--config", "tiny", "--history", "16", "--batch-size", "1", "--num-iters", "1"],
    "e2e": [
        "--config", "tiny", "--history-step", "8", "--num-batches", "3", "--candidates", "4", "--num-users", "1,2",
        "--num-iters", "1",
    ],
    "fused": ["--seqlens", "48", "--batch-size", "1", "--embedding-dim", "32", "--num-heads", "2", "--head-dim", "16"],
    "fused-layers": [
        "--seqlens", "48", "--batch-size", "1", "--embedding-dim", "32", "--num-heads", "2", "--head-dim", "16",
    ],
    "attention": ["--batch-size", "2", "--head-dims", "32,64", "--seqlens", "48,100", "--num-iters", "2"],
}  # fmt: skip
"""Sizes for a look at whether a part starts: these options come last, and the last one counts."""


def commands(device: str, results: Path, *, quick: bool = False) -> dict[str, list[str]]:
    """What to run, by the name of the part."""
    hstu = [sys.executable, "-m", "hstu_cli"]

    def part(name: str, *command: str) -> list[str]:
        file = name if name == "attention" else f"bench-{name}"
        record = ["--device", device, "--output-json", str(results / f"{file}.json")]
        return [*command, *record, *(QUICK[name] if quick else [])]

    return {
        "tests": [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow", "tests"],
        "attention": part("attention", sys.executable, "benchmarks/attention.py"),
        "layer": part("layer", *hstu, "bench-layer", "--num-iters", "20", "--num-iters-warmup", "3"),
        "layer-host": part("layer-host", *hstu, "bench-layer", "--history", "4096", "--cache-tier", "host"),
        "layer-eager": part(
            "layer-eager", *hstu, "bench-layer", "--history", "4096", "--cached", "0,31/32", "--compare", "eager"
        ),
        "fused": part("fused", *hstu, "bench-fused", "--num-iters", "20", "--num-iters-warmup", "3"),
        "fused-layers": part("fused-layers", *hstu, "bench-fused", "3", "--seqlens", "4096"),
        "e2e": part("e2e", *hstu, "bench-e2e", "--num-iters", "10"),
    }


def device_folder(device: str) -> Path:
    """The folder of this device's results, named after it."""
    from hstu_cli.backend import open_device

    name = open_device(device).backend.device_name
    return REPOSITORY / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main(
    device: Annotated[str, typer.Option(help="As in hstu --device.")] = "cuda",
    part: Annotated[list[str] | None, typer.Option(help="Run this part alone; repeatable.")] = None,
    results: Annotated[Path | None, typer.Option(help="Folder of the records.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, whose figures mean nothing.")] = False,
) -> None:
    """Run the parts in order, each with its own time and exit code."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, str(REPOSITORY))
    results = results or device_folder(device)
    results.mkdir(parents=True, exist_ok=True)
    parts = commands(device, results, quick=quick)
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
