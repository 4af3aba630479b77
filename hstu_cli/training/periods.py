"""The two periods of a run, training and validation, and the tasks that the first can teach."""

from dataclasses import dataclass

import numpy as np

from hstu_cli.config import TASKS, ModelConfig
from hstu_cli.data.dataset import PreparedDataset
from hstu_cli.errors import InputError
from hstu_cli.training.examples import ExampleSource

TRAINING_SHARE = 0.9
"""The part of the events' time span that is trained on where no date says otherwise."""


@dataclass(frozen=True, slots=True)
class Periods:
    """What a run trains and validates on.

    tasks: numbers of the tasks with both classes in the training period; left_out: why each other has no loss.
    """

    training: ExampleSource
    validation: ExampleSource
    tasks: list[int]
    left_out: dict[str, str]
    until_ms: int
    from_ms: int


def open_periods(
    dataset: PreparedDataset, config: ModelConfig, *, until_ms: int | None, from_ms: int | None
) -> Periods:
    """Requests before `until_ms` to train on, those from `from_ms` on to validate on.

    One of the two stands for both; without either, the last tenth of the time span is for validation.
    Raises InputError where a period is empty, where one user alone can be trained on, and where no
    task has both classes in the training period, or none of these in the validation period.
    """
    first, last = dataset.metadata["first_time_ms"], dataset.metadata["last_time_ms"]
    if until_ms is None:
        until_ms = from_ms if from_ms is not None else round(first + TRAINING_SHARE * (last - first))
    if from_ms is None:
        from_ms = until_ms
    events = dataset.events(dataset.requests().user_id)
    training = ExampleSource(dataset, config, until_ms=until_ms, events=events)
    validation = ExampleSource(dataset, config, from_ms=from_ms, events=events)
    span = dataset.time_span
    if training.num_examples == 0:
        raise InputError(f"{dataset.path} has no request before the end of training; its events run {span}.")
    if len(training.user_ids) == 1:
        raise InputError(f"{dataset.path} has a single user before the end of training, which teaches nothing general.")
    if validation.num_examples == 0:
        raise InputError(
            f"{dataset.path} has no request from the beginning of validation on; its events run {span}. "
            "The best epoch is chosen there: name an earlier --from or --until."
        )
    shares = _shares(training.labels())
    left_out = {task: _one_class(share) for task, share in zip(TASKS, shares, strict=True) if share in (0, 1)}
    tasks = [t for t, task in enumerate(TASKS) if task not in left_out]
    if not tasks:
        raise InputError(f"{dataset.path} has no task with both classes among the events to train on.")
    seen = _shares(validation.labels())
    if all(seen[t] in (0, 1) for t in tasks):
        raise InputError(
            f"None of {', '.join(TASKS[t] for t in tasks)} has both classes in the validation period, "
            "so no AUC can choose the best epoch: name an earlier --from or --until."
        )
    return Periods(training, validation, tasks, left_out, until_ms, from_ms)


def _shares(labels: np.ndarray) -> list[float]:
    """The share of events with each task's bit, of bit sums int16 [E]."""
    return [float(((labels >> t) & 1).mean()) for t in range(len(TASKS))]


def _one_class(share: float) -> str:
    return f"every training event has {int(share)}"
