"""What the machine itself can do, measured in the same run as what is compared with it."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from hstu_cli.backend import Backend
from hstu_cli.timing import Case, measure

ROUNDS = 5
MATMUL_SIZE = {"cpu": 4096}
COPY_BYTES = {"cpu": 1 << 28}
ACCELERATOR_MATMUL_SIZE, ACCELERATOR_COPY_BYTES = 8192, 1 << 30


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The best rates that were seen: of a large matrix product in the dtype, and of large copies.

    bytes_per_s, within the device, counts what is read and what is written; onload_bytes_per_s, from
    host memory to the device, each byte once.
    """

    flops_per_s: float
    bytes_per_s: float
    onload_bytes_per_s: float
    matmul_size: int
    copy_bytes: int

    def least_ms(self, flops: float, num_bytes: float, onload_bytes: float = 0.0) -> float:
        """The roofline: no shorter time is possible at these rates, even if all three overlap."""
        return 1e3 * max(flops / self.flops_per_s, num_bytes / self.bytes_per_s, onload_bytes / self.onload_bytes_per_s)

    def to_dict(self) -> dict[str, Any]:
        """Named as in the JSON record."""
        return asdict(self)


def measure_ceilings(backend: Backend, dtype: torch.dtype) -> Ceilings:
    """Time a square product of `dtype`, a copy within the device and one to it; the fastest round counts."""
    size = MATMUL_SIZE.get(backend.type, ACCELERATOR_MATMUL_SIZE)
    num_bytes = COPY_BYTES.get(backend.type, ACCELERATOR_COPY_BYTES)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(backend.device, dtype) for _ in range(2))
    product = torch.empty_like(a)
    source, target = (torch.ones(num_bytes, dtype=torch.uint8, device=backend.device) for _ in range(2))
    host = backend.host_tensor((num_bytes,), torch.uint8)
    cases = (
        Case("matmul", [lambda: torch.mm(a, b, out=product)]),
        Case("copy", [lambda: target.copy_(source)]),
        Case("onload", [lambda: target.copy_(host, non_blocking=True)]),
    )
    samples = measure(cases, backend, warmup=1, iterations=ROUNDS)
    return Ceilings(
        flops_per_s=2 * size**3 / (float(samples["matmul"].min()) * 1e-3),
        bytes_per_s=2 * num_bytes / (float(samples["copy"].min()) * 1e-3),
        onload_bytes_per_s=num_bytes / (float(samples["onload"].min()) * 1e-3),
        matmul_size=size,
        copy_bytes=num_bytes,
    )
