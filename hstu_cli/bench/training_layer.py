"""Layers in training on random tokens, plain and fused: what `bench-fused` checks, times and watches."""

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from hstu_cli.backend import Backend
from hstu_cli.bench.block import random_block
from hstu_cli.bench.memory import MemoryTimeline
from hstu_cli.bench.session import BenchSession, most_rounding, relative_error, wider
from hstu_cli.config import ModelConfig
from hstu_cli.kernels import BatchPlan, fused_hstu_layer, plan_batch
from hstu_cli.kernels.fused_layer import LayerSettings, composition, seeded_dropout
from hstu_cli.model.layer import HSTUBlock

# Shapes: T tokens of all sequences, D hidden_dim.

VARIANTS = {
    "baseline": None,
    "optimized": "none",
    "+layernorm_recompute": "layernorm",
    "+silu_recompute": "layernorm+silu",
}
"""What each variant computes again in its backward pass; None where the operators are torch's own."""

EAGER = "eager"
"""The plain PyTorch composition as a peer: dense attention, torch's own operators and gradients."""

Drop = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors against a wider dtype: of the output, and the largest of a gradient."""

    output: float
    gradient: float


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Memory that one pass takes beside inputs and weights.

    peak_bytes: as the device's allocator counts it, or as the timeline does where that does not count.
    points: milliseconds and bytes of live tensors; forward_end_ms: when the forward pass was over.
    """

    peak_bytes: int
    points: list[tuple[float, int]]
    forward_end_ms: float

    def to_dict(self) -> dict[str, Any]:
        """Named as in the JSON record; the points are its samples."""
        return {"forward_end_ms": self.forward_end_ms, "samples": [list(point) for point in self.points]}


class TimedPass:
    """A forward and a backward pass, and how long each part of every call took."""

    def __init__(self, workload: "TrainingWorkload", name: str) -> None:
        self._workload, self._name = workload, name
        self._timers: list[tuple[Any, Any]] = []

    def __call__(self) -> None:
        """One pass; the gradients of the last one are gone before."""
        backend = self._workload.backend
        self._workload.forget_gradients()
        forward = backend.start_timer()
        out = self._workload.forward(self._name)
        forward.stop()
        backward = backend.start_timer()
        out.backward(self._workload.grad_out)
        backward.stop()
        self._timers.append((forward, backward))

    def split_ms(self, iterations: int) -> tuple[list[float], list[float]]:
        """Milliseconds of the forward and the backward pass in the last calls, once the device is synchronised."""
        forward, backward = zip(*self._timers[-iterations:], strict=True)
        return [timer.elapsed_ms() for timer in forward], [timer.elapsed_ms() for timer in backward]


class TrainingWorkload:
    """Layers over a jagged batch, whose output's gradient is given; lengths: tokens of each sequence."""

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        dtype: torch.dtype,
        *,
        seqlen: int,
        batch_size: int,
        full: bool,
        dropout: float,
        impl: str,
        seed: int,
    ) -> None:
        self.config, self.backend, self.dropout, self.impl, self.seed = config, backend, dropout, impl, seed
        self.block = random_block(config, backend, dtype, seed)
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, seqlen + 1, (batch_size,), generator=generator).tolist()
        self.lengths = [seqlen] * batch_size if full else lengths
        self.plan = _plan(self.lengths, backend.device)
        shape = (sum(self.lengths), config.hidden_dim)
        x, grad_out = (torch.randn(shape, generator=generator).to(backend.device, dtype) for _ in range(2))
        self.x, self.grad_out = x.requires_grad_(), grad_out  # [T, D]

    def forward(self, name: str) -> torch.Tensor:
        """All layers of a variant or the peer over all tokens, [T, D]; the peers drop by torch's own dropout."""
        drop = partial(F.dropout, p=self.dropout) if self.dropout else lambda gated: gated
        return self._run(name, self.block, self.x, self.plan, lambda settings: drop)

    def forget_gradients(self) -> None:
        """As before a first backward pass."""
        for tensor in (self.x, *self.block.parameters()):
            tensor.grad = None

    def timed(self, name: str) -> TimedPass:
        """What is timed."""
        return TimedPass(self, name)

    def memory(self, name: str) -> MemoryUse:
        """Watch one pass, after one that loads what is loaded once."""
        run = self.timed(name)
        run()
        self.forget_gradients()
        self.backend.synchronize()
        before = self.backend.peak_tensor_bytes(reset=True)
        run()
        self.backend.synchronize()
        peak = self.backend.peak_tensor_bytes()
        self.forget_gradients()
        with MemoryTimeline() as timeline:
            out = self.forward(name)
            forward_end_ms = timeline.now_ms
            out.backward(self.grad_out)
        counted = timeline.peak_bytes if peak is None or before is None else peak - before
        self.forget_gradients()
        return MemoryUse(counted, timeline.points, forward_end_ms)

    def check(self, session: BenchSession, group: str, names: Sequence[str]) -> dict[str, Errors]:
        """Errors of each variant on the first sequence, against the baseline in the next wider dtype.

        All make the same dropout masks. The error of the baseline's output must be one that rounding explains; another
        variant's may be twice that, and rounding. The same holds for each gradient, but that only a fused variant must
        explain its own: torch's CPU kernel sums the gradients of a norm's weights in bfloat16, where they lose most of
        their digits over thousands of tokens.
        """
        dtype = wider(self.x.dtype)
        device = self.x.device if dtype == torch.float32 else torch.device("cpu")  # not every device has float64
        length = self.lengths[0]
        x, grad_out = self.x.detach()[:length], self.grad_out[:length]
        block = copy.deepcopy(self.block)

        def outcome(name: str, block: HSTUBlock, x: torch.Tensor, impl: str) -> list[torch.Tensor]:
            """Output and gradients of x and of all weights."""
            x = x.clone().requires_grad_()
            plan = _plan([length], x.device)
            out = self._run(name, block, x, plan, lambda s: seeded_dropout(s, self.impl, self.x.device), impl)
            return [out.detach(), *torch.autograd.grad(out, [x, *block.parameters()], grad_out.to(x.device, x.dtype))]

        exact_block = copy.deepcopy(block).to(device, dtype)
        exact_impl = "blocked" if device.type == "cpu" else self.impl
        exact = outcome("baseline", exact_block, x.to(device, dtype), exact_impl)

        def errors_of(name: str) -> list[float]:
            return [relative_error(*pair) for pair in zip(outcome(name, block, x, self.impl), exact, strict=True)]

        rounding = errors_of("baseline")
        budget = session.check_rounding(group, rounding[0], self.config.num_layers)
        most, eps = most_rounding(self.x.dtype, 2 * self.config.num_layers), torch.finfo(self.x.dtype).eps
        found = {}
        for name in names:
            errors = rounding if name == "baseline" else errors_of(name)
            session.check(f"{group}, {name}", errors[0], budget)
            for error, theirs in zip(errors[1:], rounding[1:], strict=True):
                plain = VARIANTS.get(name) is None
                most_error = sys.float_info.max if plain else min(most, 2 * (theirs + eps))
                session.check(f"{group}, {name}", error, most_error, "gradient")
            found[name] = Errors(errors[0], max(errors[1:]))
        return found

    def _run(
        self,
        name: str,
        block: HSTUBlock,
        x: torch.Tensor,
        plan: BatchPlan,
        drop_of: Callable[[LayerSettings], Drop],
        impl: str | None = None,
    ) -> torch.Tensor:
        """A variant's layers over x [T, D]; drop_of: the dropout of the variants whose operators are torch's own."""
        config, recompute = self.config, VARIANTS.get(name)
        for index, layer in enumerate(block):
            settings = LayerSettings(
                num_heads=config.num_heads,
                alpha=config.alpha,
                scaling_seqlen=config.scaling_seqlen,
                eps=config.norm_eps,
                dropout=self.dropout,
                seed=self.seed + index,
                recompute=recompute or "none",
                dtype=x.dtype,
            )
            if recompute is not None:
                x = fused_hstu_layer(x, layer.weights, plan, **settings.arguments(), impl=impl or self.impl)
            else:
                attention = "reference" if name == EAGER else impl or self.impl
                x = composition(x, layer.weights, plan, settings, impl=attention, drop=drop_of(settings))
        return x


def _plan(lengths: Sequence[int], device: torch.device) -> BatchPlan:
    """Sequences without candidates."""
    return plan_batch(torch.tensor([0, *lengths]).cumsum(0), None, sum(lengths), device)
