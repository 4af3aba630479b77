"""A training run: epochs with validation, the best checkpoint kept, resumable at any moment."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hstu_cli.bench.session import OutOfMemoryError, out_of_memory_named
from hstu_cli.config import TASKS
from hstu_cli.errors import InputError, RunError
from hstu_cli.training.examples import ExampleSource
from hstu_cli.training.folder import RunFolder
from hstu_cli.training.trainer import Trainer
from hstu_cli.training.validation import mean_auc, validate

SAVE_INTERVAL_S = 120.0
"""Time between two saved states within an epoch, unless writing one takes long."""

MOST_WRITING = 0.05
"""The largest share of the time that may go into writing states."""


@dataclass(frozen=True, slots=True)
class Watcher:
    """Who wants to know: after each step (with its rate), after each validation step, after each epoch."""

    on_step: Callable[[Trainer, float], None] = lambda trainer, examples_per_s: None
    on_validation: Callable[[int, int], None] = lambda done, total: None
    on_epoch: Callable[[Mapping[str, Any]], None] = lambda epoch: None


@dataclass
class TrainingRun:
    """Epochs of a trainer with a validation after each; `epochs` and `best` tell how it went."""

    trainer: Trainer
    validation: ExampleSource
    folder: RunFolder
    settings: Mapping[str, Any]
    epochs: list[dict[str, Any]] = field(default_factory=list)
    elapsed_s: float = 0.0

    @property
    def best(self) -> dict[str, Any] | None:
        """The epoch with the highest mean AUC, the first of equal ones; its weights are the checkpoint."""
        return max(self.epochs, key=lambda epoch: epoch["mean_auc"], default=None)

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that the folder gave; InputError where it does not fit."""
        try:
            self.trainer.load_state(state["trainer"])
            self.epochs, self.elapsed_s = list(state["epochs"]), state["elapsed_s"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.folder.state_file} does not fit this run: it is damaged.") from error

    def run(self, watcher: Watcher = Watcher()) -> None:
        """All epochs that are left. RunError where the loss diverges, with the last good checkpoint kept."""
        if self.trainer.step == 0:
            self._save()  # from now on the folder is this run's
        try:
            with out_of_memory_named():
                while len(self.epochs) < self.trainer.options.epochs:
                    self._run_epoch(watcher)
        except OutOfMemoryError as error:
            raise RunError(f"Out of memory. Take a smaller --config or lower --batch-size. {self._kept}") from error

    def _run_epoch(self, watcher: Watcher) -> None:
        """Training and validation of one epoch, and what they leave in the folder."""
        trainer = self.trainer
        try:
            self._train_epoch(watcher)
            started = time.perf_counter()
            metrics = validate(trainer.model, self.validation, trainer.backend, trainer.impl, watcher.on_validation)
            self.elapsed_s += time.perf_counter() - started
            row = self._row(metrics)
            if not math.isfinite(row["mean_auc"]):
                raise RunError(f"The loss diverged: epoch {row['epoch']} scores nothing but NaN. Try a lower --lr.")
        except RunError as error:
            raise RunError(f"{error} {self._kept}") from error
        self.epochs.append(row)
        if self.best is row:
            self.folder.write_best(trainer.model)
        self.folder.write_log(self.epochs)
        self._save()
        watcher.on_epoch(row)

    @property
    def _kept(self) -> str:
        """What a run that fails leaves behind, as a sentence."""
        return f"{self.folder.path} keeps epoch {self.best['epoch']}." if self.best else "There is no checkpoint yet."

    def _train_epoch(self, watcher: Watcher) -> None:
        """The rest of the epoch, saving the state now and then."""
        trainer = self.trainer
        begun = saved = time.perf_counter()
        elapsed_before, done_before = self.elapsed_s, trainer.sums.examples if trainer.mid_epoch else 0
        interval = SAVE_INTERVAL_S

        def on_step() -> None:
            nonlocal saved, interval
            now = time.perf_counter()
            self.elapsed_s = elapsed_before + now - begun
            watcher.on_step(trainer, (trainer.sums.examples - done_before) / (now - begun))
            if now - saved > interval and trainer.mid_epoch:
                self._save()
                saved = time.perf_counter()
                interval = max(SAVE_INTERVAL_S, (saved - now) / MOST_WRITING)

        trainer.run_epoch(on_step)

    def _row(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        trainer = self.trainer
        tasks = [TASKS[t] for t in trainer.tasks.tolist()]
        return {
            "epoch": trainer.epoch,
            "step": trainer.step,
            "elapsed_s": round(self.elapsed_s, 3),
            **trainer.sums.means(),
            "mean_auc": mean_auc(metrics, tasks),
            **{f"auc_{task}": metrics["auc"][task] for task in tasks},
            **{f"hit_rate_{k}": hits for k, hits in metrics["hit_rate"].items()},
        }

    def _save(self) -> None:
        state = {"trainer": self.trainer.state(), "epochs": self.epochs, "elapsed_s": self.elapsed_s}
        self.folder.write_state(self.settings, state)
