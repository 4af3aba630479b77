"""What the machine itself can do, measured in the same run as what is compared with it."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from hstu_cli.backend import Backend
from hstu_cli.kernels.native.build import native_state
from hstu_cli.timing import Case, measure

ROUNDS = 5
MATMUL_SIZE = {"cpu": 4096}
COPY_BYTES = {"cpu": 1 << 28}
ACCELERATOR_MATMUL_SIZE, ACCELERATOR_COPY_BYTES = 8192, 1 << 30
TILE_REPEATS = 20_000
"""Of the native tile loop: about ten milliseconds."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The best rates that were seen: of matrix products in the dtype, and of large copies.

    flops_per_s is the larger of matmul_flops_per_s, of torch's large product, and tile_flops_per_s, of the
    native operators' inner loop on operands that stay in the first-level cache; None where that is not built.
    bytes_per_s, within the device, counts what is read and what is written; onload_bytes_per_s, from
    host memory to the device, each byte once.
    """

    flops_per_s: float
    matmul_flops_per_s: float
    tile_flops_per_s: float | None
    bytes_per_s: float
    onload_bytes_per_s: float
    matmul_size: int
    copy_bytes: int

    def least_ms(self, flops: float, num_bytes: float, onload_bytes: float = 0.0) -> float:
        """The roofline: no shorter time is possible at these rates, even if all three overlap."""
        return 1e3 * max(flops / self.flops_per_s, num_bytes / self.bytes_per_s, onload_bytes / self.onload_bytes_per_s)

    def or_better(self, other: "Ceilings") -> "Ceilings":
        """The higher of each rate: a measurement beside other work shows less than the machine can do."""
        rates = {name: max(filter(None, values), default=None) for name, values in self._pairs(other)}
        return replace(self, **rates)

    def _pairs(self, other: "Ceilings") -> Iterator[tuple[str, tuple[float | None, float | None]]]:
        for rate in fields(self):
            if rate.name.endswith("_per_s"):
                yield rate.name, (getattr(self, rate.name), getattr(other, rate.name))

    def apply(self, row: dict[str, Any]) -> None:
        """Set the row's `roofline_fraction` and `speedup_limit_roofline` by what it and the uncached case cost.

        The row: `flops, bytes, onload_bytes`, the same of the uncached case as `base_*`, and its latency. A row of
        several steps, one after another, has these costs under `batch_costs`, for each, and the latency of all under
        `total_latency_ms`: only within a step can computing and moving overlap, so the steps' least times add up.
        """
        steps = row.get("batch_costs", [row])
        least_ms = sum(self.least_ms(step["flops"], step["bytes"], step["onload_bytes"]) for step in steps)
        base_ms = sum(self.least_ms(step["base_flops"], step["base_bytes"]) for step in steps)
        row["roofline_fraction"] = least_ms / row.get("total_latency_ms", row["latency_ms"])["p50"]
        row["speedup_limit_roofline"] = base_ms / least_ms

    def to_dict(self) -> dict[str, Any]:
        """Named as in the JSON record."""
        return asdict(self)


def measure_ceilings(backend: Backend, dtype: torch.dtype) -> Ceilings:
    """Time products of `dtype`, a copy within the device and one to it; the fastest round of each counts."""
    size = MATMUL_SIZE.get(backend.type, ACCELERATOR_MATMUL_SIZE)
    num_bytes = COPY_BYTES.get(backend.type, ACCELERATOR_COPY_BYTES)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(backend.device, dtype) for _ in range(2))
    product = torch.empty_like(a)
    source, target = (torch.ones(num_bytes, dtype=torch.uint8, device=backend.device) for _ in range(2))
    host = backend.host_tensor((num_bytes,), torch.uint8)
    cases = [
        Case("matmul", [lambda: torch.mm(a, b, out=product)]),
        Case("copy", [lambda: target.copy_(source)]),
        Case("onload", [lambda: target.copy_(host, non_blocking=True)]),
    ]
    tile_flops = _tile_loop(backend, dtype, cases)
    samples = measure(cases, backend, warmup=1, iterations=ROUNDS)
    rate = {name: 1e3 / float(times.min()) for name, times in samples.items()}  # per second
    matmul = 2 * size**3 * rate["matmul"]
    tiles = tile_flops * rate["tiles"] if tile_flops else None
    return Ceilings(
        flops_per_s=max(matmul, tiles or 0.0),
        matmul_flops_per_s=matmul,
        tile_flops_per_s=tiles,
        bytes_per_s=2 * num_bytes * rate["copy"],
        onload_bytes_per_s=num_bytes * rate["onload"],
        matmul_size=size,
        copy_bytes=num_bytes,
    )


def _tile_loop(backend: Backend, dtype: torch.dtype, cases: list[Case]) -> int:
    """Add the native operators' inner loop to the cases, where they are built and have one; returns its FLOPs."""
    if backend.type != "cpu" or dtype != torch.bfloat16 or not native_state(build=False).built:
        return 0
    operators = torch.ops.hstu_native
    if not operators.has_bf16_tiles():
        return 0
    cases.append(Case("tiles", [lambda: operators.multiply_tiles(TILE_REPEATS)]))
    return operators.multiply_tiles(1) * TILE_REPEATS
