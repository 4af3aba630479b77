"""What one run of a benchmark shares: the device, its ceilings, how often, and what went wrong."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import profile, record_function

from hstu_cli.backend import Backend
from hstu_cli.bench.ceilings import Ceilings, measure_ceilings
from hstu_cli.config import MODEL_PRESETS, ModelConfig, resolve_model_config
from hstu_cli.errors import RunError
from hstu_cli.hardware import HardwarePreset
from hstu_cli.timing import Case, CpuWatch, PairedRatio, measure, noise_warnings, paired_ratio, some

LAYER_ROUNDINGS = 5
"""Of a layer, in the dtype and one upon another: normalised input, projection, attention, gated output, sum."""

FLOAT32_ROUNDING = 1e-3
"""For float32 on any device: some accelerators multiply it with the 10 bits of TF32."""

MEMORY_SHARE = 0.8
"""Share of the available memory that a case may take by its estimate."""

CONTRARY = 0.05
"""So far apart, and on either side of 1, a paired speed-up and the ratio of the medians contradict one another."""

ROW_NAMES = {
    "num_users": "users",
    "seqlen": "tokens",
    "history_length": "history",
    "cached_length": "cached",
    "num_candidates": "candidates",
    "batch_size": "batch",
    "embedding": "",
    "variant": "",
    "impl": "",
}
"""The fields that name a row, and how a warning calls those that are numbers."""


@dataclass
class BenchSession:
    """The settings of a run, and the samples and failures that its cases leave behind.

    profile_dir: a trace of a round of each group of cases goes there.
    """

    backend: Backend
    dtype: torch.dtype
    ceilings: Ceilings
    warmup: int
    iterations: int
    profile_dir: Path | None = None
    failures: list[str] = field(default_factory=list)
    _samples: dict[str, np.ndarray] = field(default_factory=dict)
    _contrary: list[str] = field(default_factory=list)
    _watch: CpuWatch = field(default_factory=CpuWatch)

    def measure(self, group: str, cases: Sequence[Case]) -> dict[str, np.ndarray]:
        """Milliseconds of each case, float64 [iterations, steps]; see `hstu_cli.timing.measure`."""
        if self.profile_dir is not None:
            self._trace(group, cases)
        samples = measure(cases, self.backend, warmup=self.warmup, iterations=self.iterations)
        self._samples |= {f"{group}, {name}": values for name, values in samples.items()}
        return samples

    def remeasure(self, rows: Sequence[dict[str, Any]]) -> None:
        """Measure the ceilings again, at the end of a run, and apply the better ones to its rows."""
        self.ceilings = self.ceilings.or_better(measure_ceilings(self.backend, self.dtype))
        for row in rows:
            if "base_flops" in row:
                self.ceilings.apply(row)

    def memory_lacking(self, num_bytes: float) -> str | None:
        """Why a case of so many bytes is left out, or None where it fits."""
        self.backend.release_memory()
        available = self.backend.available_memory_bytes
        if num_bytes <= MEMORY_SHARE * available:
            return None
        return f"needs about {num_bytes / 1e9:,.1f} GB, {available / 1e9:,.1f} GB are available"

    def check_rounding(self, what: str, error: float, num_layers: int) -> float:
        """The budget of what is compared with an uncached result that is itself so far from the exact one.

        Twice that error and rounding; the error itself must be one that the rounding of so many layers can explain.
        """
        self.check(f"{what}, uncached", error, most_rounding(self.dtype, num_layers))
        return 2 * (error + torch.finfo(self.dtype).eps)

    def check(self, what: str, error: float, budget: float, kind: str = "output") -> None:
        """Note a case whose output, or what else `kind` names, is off by more than it may be, or not finite."""
        if not error <= budget:
            self.failures.append(f"{what}: {kind} error {error:.3g} is beyond the budget {budget:.3g}")

    def speedup(self, group: str, base: str, name: str) -> PairedRatio:
        """How many times as fast as `base` a measured case is, in pairs; notes where the medians say the contrary."""
        theirs, own = (self._samples[f"{group}, {case}"] for case in (base, name))
        ratio = paired_ratio(theirs, own)
        medians = float(np.median(theirs.sum(axis=-1)) / np.median(own.sum(axis=-1)))
        if (ratio.median - 1) * (medians - 1) < 0 and abs(ratio.median - medians) > CONTRARY:
            self._contrary.append(f"{group}, {name}: {ratio.median:.2f} in pairs, {medians:.2f} of the medians")
        return ratio

    def warnings(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """What readers must know about the noise of all cases so far, whose rows these are."""
        warnings = noise_warnings(self._samples) + self._watch.warnings()
        if self._samples and self.iterations == 1:
            warnings.append("a single sample of each case: it does not show how much they vary (raise --num-iters)")
        if self._contrary:
            warnings.append(f"speed-up and medians disagree about which case is faster: {some(self._contrary)}")
        beyond = max((row.get("roofline_fraction") or 0.0 for row in rows), default=0.0)
        if beyond > 1:
            warnings.append(f"a case reached {beyond:.0%} of the measured ceilings")
        faster = [text for row in rows if (text := _beyond_limits(row))]
        if faster:
            warnings.append(f"speed-ups beyond both of their limits: {some(faster)}")
        return warnings

    def raise_failures(self) -> None:
        """RunError where the output of a case was wrong."""
        if self.failures:
            raise RunError("; ".join(self.failures))

    def _trace(self, group: str, cases: Sequence[Case]) -> None:
        """A round of each case under torch's profiler, as a trace for Perfetto or chrome://tracing."""
        for case in cases:  # first calls load and compile
            case.prepare()
            for step in case.steps:
                step()
        with profile(activities=torch.profiler.supported_activities()) as trace:
            for case in cases:
                case.prepare()
                with record_function(case.name):
                    for step in case.steps:
                        step()
                    self.backend.synchronize()
        name = "".join(c if c.isalnum() else "-" for c in group)
        trace.export_chrome_trace(str(self.profile_dir / f"{name}.json"))


def _beyond_limits(row: Mapping[str, Any]) -> str | None:
    """The speed-up of a row that is beyond both of its limits, in words; None for any other row."""
    speedup = row.get("speedup_vs_uncached", row.get("speedup_vs_baseline"))
    limits = [row[name] for name in ("speedup_limit", "speedup_limit_roofline") if name in row]
    if speedup is None or not limits or speedup <= max(limits):
        return None
    named = (f"{word} {row[name]}".strip() for name, word in ROW_NAMES.items() if name in row)
    return f"{speedup:.2f}, limit {max(limits):.2f} ({', '.join(named)})"


class OutOfMemoryError(Exception):
    """Memory did not suffice for a group of cases, whatever allocator said so."""


@contextmanager
def out_of_memory_named() -> Iterator[None]:
    """Give an allocator's error one name; every other error goes on as it is."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemoryError from error
    except RuntimeError as error:  # the CPU's allocator says it in words alone
        if "can't allocate memory" not in str(error):
            raise
        raise OutOfMemoryError from error


Progress = Callable[[int, int], None]
"""Called with the groups of cases that are done and all of them."""


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in float64."""
    expected = expected.to("cpu", torch.float64)
    scale = max(float(expected.norm()), torch.finfo(torch.float64).tiny)
    return float((output.to("cpu", torch.float64) - expected).norm()) / scale


def most_rounding(dtype: torch.dtype, num_layers: int) -> float:
    """The most that rounding may do to the output of so many layers, relative; beyond it something is wrong.

    Each rounding is off by at most eps / 2 and those of a layer add up at worst; layers are independent of one
    another, so theirs add up as the root of their number.
    """
    if dtype == torch.float32:
        return FLOAT32_ROUNDING
    return LAYER_ROUNDINGS * torch.finfo(dtype).eps / 2 * num_layers**0.5


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype whose results count as exact for another."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def benchmark_config(name_or_path: str | None, preset: HardwarePreset | None) -> ModelConfig:
    """The model of a benchmark: what the user names, else `benchmark` with the heads that suit a hardware preset."""
    if name_or_path is not None:
        return resolve_model_config(name_or_path)
    config = MODEL_PRESETS["benchmark"]
    return replace(config, num_heads=preset.num_heads, head_dim=preset.head_dim) if preset else config
