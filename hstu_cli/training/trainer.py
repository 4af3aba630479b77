"""The training loop: one optimiser step after another, each decided by the seed and its number alone."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hstu_cli.backend import Backend
from hstu_cli.errors import RunError
from hstu_cli.model.embedding import DEFAULT_KEY
from hstu_cli.model.ranking import RankingModel
from hstu_cli.model.tokens import ACTION_TABLE, VIDEO_TABLE
from hstu_cli.training.examples import ExampleBatch, ExampleSource, parts_of_tokens, score_examples
from hstu_cli.training.loss import NextItemChoice, next_item_loss, ranking_loss, task_targets
from hstu_cli.training.options import TrainingOptions
from hstu_cli.training.setup import KEYED_TABLES, ActionBits, set_dropout

# Shapes: E examples of a step, P of them with a token before them, D hidden_dim, 8 tasks.

MAX_GRADIENT_NORM = 1.0
ADAM_BETAS = (0.9, 0.98)

STEP_TOKENS = 131_072
"""Tokens that are in memory at a time; a step with more is computed in parts, one long pass apart."""

DIVERGED = 10.0
"""A loss so many times that of the first step is no longer learning anything."""


@dataclass(slots=True)
class LossSums:
    """Sums over the examples so far; the loss of an epoch is their ratio."""

    ranking: float = 0.0
    next_item: float = 0.0
    examples: int = 0
    predictions: int = 0

    def add(self, ranking: float, next_item: float, examples: int, predictions: int) -> None:
        """Count a step."""
        self.ranking += ranking
        self.next_item += next_item
        self.examples += examples
        self.predictions += predictions

    def means(self) -> dict[str, float]:
        """Mean losses by name."""
        return {
            "ranking_loss": self.ranking / max(1, self.examples),
            "next_item_loss": self.next_item / max(1, self.predictions),
        }


class Trainer:
    """Fits a model to the examples of a period, from any step on."""

    def __init__(
        self,
        model: RankingModel,
        source: ExampleSource,
        tasks: list[int],
        options: TrainingOptions,
        backend: Backend,
        *,
        dtype: torch.dtype,
        impl: str,
    ) -> None:
        """tasks: those with a loss; dtype: of the activations, while the weights are float32."""
        self.model, self.source, self.options, self.backend = model, source, options, backend
        self.dtype, self.impl = dtype, impl
        self.tasks = torch.tensor(tasks, device=backend.device)
        self.passes = source.passes()
        self.steps_per_epoch = math.ceil(len(self.passes) / options.batch_size)
        self.step = 0  # steps done since the beginning
        self.first_loss: float | None = None
        self.sums = LossSums()  # of the epoch so far
        self.actions = ActionBits(model.embeddings[ACTION_TABLE], torch.Generator().manual_seed(options.seed))
        groups = _parameter_groups(model, self.actions, options)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=ADAM_BETAS)
        set_dropout(model, options.dropout)

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.steps_per_epoch

    @property
    def epoch_number(self) -> int:
        """The epoch that the last step belongs to, from 1."""
        return max(1, math.ceil(self.step / self.steps_per_epoch))

    @property
    def mid_epoch(self) -> bool:
        """Whether an epoch has begun and is not done."""
        return self.step % self.steps_per_epoch > 0

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.options.epochs * self.steps_per_epoch

    def run_epoch(self, on_step: Callable[[], None] = lambda: None) -> None:
        """Steps up to the end of the epoch; RunError where the loss diverges."""
        self.model.train()
        epoch = self.epoch
        if not self.mid_epoch:
            self.sums = LossSums()
        order = np.random.default_rng([self.options.seed, epoch]).permutation(len(self.passes))
        with matmul_precision(self.dtype):
            while self.epoch == epoch:
                start = self.step % self.steps_per_epoch * self.options.batch_size
                self._step(order[start : start + self.options.batch_size])
                on_step()

    def learning_rate(self) -> float:
        """Of the next step: a linear rise, then half a cosine down to 0."""
        warmup = max(1, round(self.options.warmup * self.num_steps))
        rise = min(1.0, (self.step + 1) / warmup)
        return self.options.lr * rise * 0.5 * (1 + math.cos(math.pi * self.step / self.num_steps))

    def state(self) -> dict[str, Any]:
        """All that a later `load_state` needs to go on as if nothing had happened."""
        sums = [self.sums.ranking, self.sums.next_item, self.sums.examples, self.sums.predictions]
        return {
            "model": self.model.state_dict(),
            "actions": self.actions.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "first_loss": self.first_loss,
            "sums": sums,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.model.load_state_dict(state["model"])
        self.actions.load_state_dict(state["actions"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.first_loss, self.sums = state["step"], state["first_loss"], LossSums(*state["sums"])

    def _step(self, members: np.ndarray) -> None:
        """One step on some passes."""
        # Everything random of a step follows from its number, so a resumed run repeats the very same.
        seeds = np.random.SeedSequence([self.options.seed, self.step]).generate_state(2, np.uint64).tolist()
        torch.manual_seed(seeds[0])
        generator = torch.Generator().manual_seed(seeds[1])
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad()
        passes = [self.passes[i] for i in members]
        num_examples, num_predictions = self.source.count(passes)
        loss = 0.0
        for part in parts_of_tokens(passes, STEP_TOKENS):  # their gradients add up to those of the whole
            batch = self.source.batch(part)
            self._forget_some_ids(batch, generator)
            ranking, next_item = self._losses(batch, generator)
            share = ranking / num_examples + self.options.next_item_weight * next_item / max(1, num_predictions)
            share.backward()
            loss += share.item()
            self.sums.add(ranking.item(), next_item.item(), len(batch.labels), int(batch.has_previous.sum()))
        self.actions.take_gradient()
        norm = nn.utils.clip_grad_norm_(self.parameters, MAX_GRADIENT_NORM)
        self._check(loss, norm.item())
        self.optimizer.step()
        self.actions.write()
        self.step += 1

    def _losses(self, batch: ExampleBatch, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of all tasks summed over the examples, and that of the next item over the predictions."""
        model, device = self.model, self.backend.device
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits, previous = score_examples(model, batch, self.impl)  # [E, 8], [P, D]
        labels = torch.from_numpy(batch.labels.astype(np.int64)).to(device)
        ranking = ranking_loss(logits, task_targets(labels), self.tasks)
        targets = model.embeddings[VIDEO_TABLE].rows_of(batch.video_ids[batch.has_previous].to(device))
        choice = NextItemChoice.draw(model, self.options.num_negatives, generator)
        return ranking, next_item_loss(model, previous, targets, choice)

    def _forget_some_ids(self, batch: ExampleBatch, generator: torch.Generator) -> None:
        """Replace a share of the ids by one that nobody has, so that the default rows are trained."""
        for name in KEYED_TABLES:
            if name in batch.tokens.ids:
                ids = batch.tokens.ids[name]
                forgotten = torch.rand(ids.shape, generator=generator) < self.options.id_dropout
                ids.masked_fill_(forgotten, DEFAULT_KEY)

    def _check(self, loss: float, gradient_norm: float) -> None:
        """RunError where the loss is not finite, or far above that of the first step."""
        if self.first_loss is None:
            self.first_loss = loss
        if math.isfinite(loss) and math.isfinite(gradient_norm) and loss <= DIVERGED * self.first_loss:
            return
        raise RunError(
            f"The loss diverged: {loss:.4g} at step {self.step + 1:,} (epoch {self.epoch + 1}), "
            f"{self.first_loss:.4g} at the first. Try a lower --lr."
        )


@contextmanager
def matmul_precision(dtype: torch.dtype) -> Iterator[None]:
    """Multiply float32 matrices, such as those of the losses, in bf16 where the activations are; sums stay float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _parameter_groups(model: RankingModel, actions: ActionBits, options: TrainingOptions) -> list[dict[str, Any]]:
    """Weight decay for the matrices of layers and head; none for embeddings, norms and biases."""
    matrices = [p for part in (model.layers, model.head) for p in part.parameters() if p.dim() > 1]
    others = [p for part in (model.layers, model.head) for p in part.parameters() if p.dim() <= 1]
    tables = [table.weight for name, table in model.embeddings.items() if name != ACTION_TABLE]
    return [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": [*others, *tables, model.position.weight, actions.vectors], "weight_decay": 0.0},
    ]
