"""How good a trained model is on real rows: hit rate and AUC after the training period, over several seeds.

Trains on every request before `--until` for a fixed number of epochs, then scores every event after it
with all of that user's earlier events as history. Nothing of the test period chooses anything: settings
and epochs come from `--study`, which trains on an earlier part and validates on the days before `--until`.

Baselines from the same rows: items by popularity in the training period, and the sum of the log-odds of
the item's and the user's rate.
"""

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from hstu_cli.backend import Backend
from hstu_cli.bench.metrics import ReplayMetrics
from hstu_cli.commands.options import parse_counts, parse_date
from hstu_cli.config import CONTEXTUAL_FEATURES, MODEL_PRESETS, TASKS, ModelConfig
from hstu_cli.data.dataset import PreparedDataset
from hstu_cli.data.layout import dataset_name
from hstu_cli.model import save_checkpoint
from hstu_cli.report import environment, key_value_table, plain
from hstu_cli.training.examples import ExampleSource
from hstu_cli.training.options import TrainingOptions
from hstu_cli.training.periods import open_periods
from hstu_cli.training.setup import new_model
from hstu_cli.training.trainer import Trainer
from hstu_cli.training.validation import validate

CONFIG = replace(
    MODEL_PRESETS["tiny"],
    hidden_dim=128,
    num_heads=4,
    head_dims=(128, 8),
    max_history=256,
    scaling_seqlen=256,
    contextual_features=CONTEXTUAL_FEATURES[1:],
)
"""The model: two layers, 128 wide, a window that holds every history of the sample, no user ids."""

OPTIONS = TrainingOptions(epochs=4, lr=4e-3)
STUDY_DAYS = 7
STUDY_EPOCHS = 2
DAY_MS = 86_400_000

TARGETS = {"hit_rate_10": 0.048, "hit_rate_50": 0.16, "auc_long_view": 0.740, "auc_is_click": 0.725}


VARIANTS: dict[str, Callable[[ModelConfig, TrainingOptions], tuple[ModelConfig, TrainingOptions]]] = {
    "as used": lambda c, o: (c, o),
    "with user_id": lambda c, o: (replace(c, contextual_features=CONTEXTUAL_FEATURES), o),
    "learning rate 0.002": lambda c, o: (c, replace(o, lr=2e-3)),
    "learning rate 0.008": lambda c, o: (c, replace(o, lr=8e-3)),
    "next-item weight 1": lambda c, o: (c, replace(o, next_item_weight=1.0)),
    "next-item weight 0.1": lambda c, o: (c, replace(o, next_item_weight=0.1)),
    "width 64": lambda c, o: (replace(c, hidden_dim=64, num_heads=2, head_dims=(64, 8)), o),
    "dropout 0": lambda c, o: (c, replace(o, dropout=0.0)),
    "512 negatives": lambda c, o: (c, replace(o, num_negatives=512)),
    "weight decay 0.1": lambda c, o: (c, replace(o, weight_decay=0.1)),
}
"""One change each."""


def trained_and_scored(
    dataset: PreparedDataset,
    config: ModelConfig,
    options: TrainingOptions,
    *,
    until_ms: int,
    scored_until_ms: int | None,
    dtype: torch.dtype,
    log: Callable[[str], None],
    save: Path | None = None,
) -> dict[str, Any]:
    """Train on requests before `until_ms`; the metrics of every event from then to `scored_until_ms`."""
    backend = Backend()
    periods = open_periods(dataset, config, until_ms=until_ms, from_ms=None)
    test = ExampleSource(dataset, config, from_ms=until_ms, until_ms=scored_until_ms)
    model = new_model(dataset, config, periods.training, backend, options.seed)
    trainer = Trainer(model, periods.training, periods.tasks, options, backend, dtype=dtype, impl="blocked")
    started = time.perf_counter()
    losses = []
    for _ in range(options.epochs):
        trainer.run_epoch()
        losses.append(trainer.sums.means())
        log(f"  epoch {trainer.epoch}: {losses[-1]}, {time.perf_counter() - started:,.0f} s")
    trained = time.perf_counter()
    metrics = validate(model, test, backend, "blocked")
    if save is not None:
        save_checkpoint(model, save)
    return {
        **{f"hit_rate_{k}": hits for k, hits in metrics["hit_rate"].items()},
        **{f"auc_{task}": auc for task, auc in metrics["auc"].items()},
        "losses": losses,
        "num_examples": test.num_examples,
        "training_s": trained - started,
        "scoring_s": time.perf_counter() - trained,
    }


def baselines(dataset: PreparedDataset, config: ModelConfig, until_ms: int) -> dict[str, float]:
    """Popularity as the next item, and rates of items and users as scores, on the events of the test period."""
    training = ExampleSource(dataset, config, until_ms=until_ms)
    test = ExampleSource(dataset, config, from_ms=until_ms)
    before, after = (_columns(source) for source in (training, test))
    videos, counts = np.unique(before["video"], return_counts=True)
    rank = dict(zip(videos[np.argsort(-counts, kind="stable")].tolist(), range(1, len(videos) + 1), strict=True))
    ranks = np.array([rank.get(video, 0) for video in after["video"].tolist()])
    metrics = ReplayMetrics()
    scores = np.zeros((len(ranks), len(TASKS)), np.float32)
    for t in range(len(TASKS)):
        scores[:, t] = sum(_log_odds(before, after, key, t) for key in ("video", "user"))
    metrics.add(ranks, scores, after["labels"])
    found = metrics.summary((10, 50))
    return {
        **{f"hit_rate_{k}": hits for k, hits in found["hit_rate"].items()},
        **{f"auc_{task}": found["auc"][task] for task in ("long_view", "is_click")},
    }


def _columns(source: ExampleSource) -> dict[str, np.ndarray]:
    """User, video and label of every example, in one order."""
    batches = [(passes, source.batch(passes)) for passes in source.batches_of_tokens(1 << 17)]
    users = [
        np.repeat(source.user_ids[[one.user for one in passes]], [one.end - one.scored_from for one in passes])
        for passes, _ in batches
    ]
    return {
        "user": np.concatenate(users),
        "video": np.concatenate([batch.video_ids.numpy() for _, batch in batches]),
        "labels": np.concatenate([batch.labels for _, batch in batches]),
    }


def _log_odds(before: dict[str, np.ndarray], after: dict[str, np.ndarray], key: str, task: int) -> np.ndarray:
    """Log-odds of a task's rate among the training events of each test event's item or user, smoothed to the mean."""
    label = (before["labels"] >> task) & 1
    ids, inverse, counts = np.unique(before[key], return_inverse=True, return_counts=True)
    mean = label.mean()
    rate = (np.bincount(inverse, label) + 10 * mean) / (counts + 10)
    place = np.searchsorted(ids, after[key]).clip(max=len(ids) - 1)
    own = np.where(ids[place] == after[key], rate[place], mean).clip(1e-6, 1 - 1e-6)
    return np.log(own / (1 - own))


@dataclass(frozen=True, slots=True)
class Job:
    """One row of the record: what to train, on what, and how to call it."""

    name: dict[str, Any]
    config: ModelConfig
    options: TrainingOptions
    until_ms: int
    scored_until_ms: int | None
    save: Path | None = None


def jobs_of(study: bool, seeds: tuple[int, ...], until_ms: int, save: Path | None) -> list[Job]:
    """A job per seed, or per variant of the study."""
    if not study:
        return [
            Job({"seed": seed}, CONFIG, replace(OPTIONS, seed=seed), until_ms, None, save and save / f"seed-{seed}")
            for seed in seeds
        ]
    options = replace(OPTIONS, epochs=STUDY_EPOCHS, seed=seeds[0])
    split_ms = until_ms - STUDY_DAYS * DAY_MS
    return [Job({"variant": name}, *change(CONFIG, options), split_ms, until_ms) for name, change in VARIANTS.items()]


def run_job(job: Job, data_root: Path, name: str, dtype: str, threads: int) -> dict[str, Any]:
    """The row of a job."""
    Backend().tune_process()
    torch.set_num_threads(threads)
    log = Console(stderr=True, soft_wrap=True).print
    row = trained_and_scored(
        PreparedDataset(data_root, name),
        job.config,
        job.options,
        until_ms=job.until_ms,
        scored_until_ms=job.scored_until_ms,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype],
        log=lambda text: log(f"{job.name}: {text}"),
        save=job.save,
    )
    return job.name | row


def main(
    data_root: Annotated[Path, typer.Option(help="Folder of the prepared data.")],
    out: Annotated[Path, typer.Option(help="The JSON record; rows that it has already are not made again.")],
    dataset: str = "pure",
    until: str = "2022-04-25",
    seeds: str = "0,1,2,3,4",
    study: Annotated[bool, typer.Option("--study", help="One change at a time, on a validation split.")] = False,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "bf16",
    processes: Annotated[int, typer.Option(help="Rows to make at a time, each with its share of the cores.")] = 1,
    save: Annotated[Path | None, typer.Option(help="Keep each seed's checkpoint in this folder.")] = None,
) -> None:
    """Train, score, and write a record after each seed or variant."""
    prepared = PreparedDataset(data_root, dataset_name(dataset))
    until_ms = parse_date("--until", until)
    threads = max(1, torch.get_num_threads() // processes)
    record: dict[str, Any] = {
        "command": "benchmarks/quality.py",
        "env": environment(Backend().device_name, Backend().memory_bytes) | {"threads": threads},
        "dataset": {"name": prepared.name, "num_events": prepared.metadata["num_events"]},
        "until": until,
        "model": CONFIG.to_dict(),
        "options": asdict(OPTIONS) | {"dtype": dtype, "study_days": STUDY_DAYS, "study_epochs": STUDY_EPOCHS},
        "study": study,
        "rows": [],
    }
    if not study:
        record |= {"targets": TARGETS, "baselines": baselines(prepared, CONFIG, until_ms)}
    if out.exists():
        earlier = json.loads(out.read_text(encoding="utf-8"))
        if any(earlier[name] != plain(record[name]) for name in ("model", "options", "until", "study", "dataset")):
            raise typer.BadParameter(f"{out} was made with other settings.")
        record["rows"] = earlier["rows"]
    done = [row.get("variant", row.get("seed")) for row in record["rows"]]
    jobs = [j for j in jobs_of(study, parse_counts("--seeds", seeds, least=0), until_ms, save) if not done_in(j, done)]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(run_job, job, data_root, prepared.name, dtype, threads) for job in jobs]
        for finished in as_completed(running):
            add_row(record, finished.result(), out)


def done_in(job: Job, done: list[Any]) -> bool:
    """Whether the record has the job's row."""
    return next(iter(job.name.values())) in done


def add_row(record: dict[str, Any], row: dict[str, Any], out: Path) -> None:
    """Put a row into the record, write it, and show it."""
    record["rows"].append(row)
    tables = [key_value_table(f"{row.get('variant', row.get('seed'))}", {k: row[k] for k in (*TARGETS, "training_s")})]
    if not record["study"]:
        record["summary"] = {
            name: _spread([row[name] for row in record["rows"]]) for name in (*TARGETS, "training_s", "scoring_s")
        }
        record["reached"] = {name: record["summary"][name]["mean"] >= target for name, target in TARGETS.items()}
        tables.append(key_value_table("mean so far", {k: v["mean"] for k, v in record["summary"].items()}))
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(plain(record), indent=1) + "\n", encoding="utf-8")
    partial.replace(out)
    for table in tables:
        Console().print(table)


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
    }


if __name__ == "__main__":
    typer.run(main)
