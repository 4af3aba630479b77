"""`hstu train`: fit a ranking model to a data set's events; the best checkpoint, a log, and a state to go on from."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hstu_cli.commands import options
from hstu_cli.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLE = "Example: hstu train --config tiny --dataset pure --until 2022-04-25 --out model"

MOST_TASKS = 3
"""Tasks with a column of their own; the log has them all."""


def train(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the best checkpoint, the log and the state.")],
    config: options.Config = None,
    dataset: options.Dataset = None,
    data_root: options.DataRoot = None,
    until: Annotated[
        str | None, typer.Option(metavar="DATE", help="Train on requests before this, UTC+8.", show_default="--from")
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="DATE", help="Validate on requests from this on, UTC+8.", show_default="--until"
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Times through the training period.")] = 8,
    lr: Annotated[float, typer.Option(help="Highest learning rate, after a warm-up and before a cosine.")] = 2e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Passes of a step: users, or windows of long ones.")] = 128,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW, on the matrices of layers and head.")] = 0.01,
    dropout: Annotated[float, typer.Option(help="Of token embeddings and gated attention outputs.")] = 0.1,
    id_dropout: Annotated[float, typer.Option(help="Share of user and video ids replaced by the unknown one.")] = 0.02,
    next_item_weight: Annotated[float, typer.Option(help="Weight of the next-item loss beside the tasks'.")] = 0.3,
    num_negatives: Annotated[
        int | None,
        typer.Option(min=1, help="Items to tell the next one from.", show_default="all, or 32,768 of more"),
    ] = None,
    recompute: Annotated[
        str,
        typer.Option(
            help="Keep less for the backward pass: none, layernorm, silu or layernorm+silu; the result stays."
        ),
    ] = "none",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, if there is one.")] = False,
    device: options.Device = "auto",
    require_device: options.RequireDevice = False,
    dtype: options.Dtype = "auto",
    impl: options.TrainingImpl = "auto",
    seed: options.Seed = 0,
    format: options.Format = options.OutputFormat.rich,
    output_json: options.OutputJson = None,
    metadata: options.Metadata = None,
    verbose: options.Verbose = False,
) -> None:
    """Train on every event of a period, validate on those after it, keep the best checkpoint."""
    args = {name.rstrip("_"): value for name, value in locals().items()}
    until_ms, from_ms = options.parse_date("--until", until), options.parse_date("--from", from_)
    if until_ms is not None and from_ms is not None and from_ms < until_ms:
        raise UsageError(f"--from {from_} is before --until {until}: events would be trained and validated on.")
    for name, value, most in (
        ("--lr", lr, math.inf),
        ("--weight-decay", weight_decay, math.inf),
        ("--next-item-weight", next_item_weight, math.inf),
        ("--dropout", dropout, 1.0),
        ("--id-dropout", id_dropout, 1.0),
    ):
        if not 0 <= value < most or (name == "--lr" and value == 0):
            allowed = "from 0 to below 1" if most == 1 else "above 0" if name == "--lr" else "of 0 or more"
            raise UsageError(f"{name} takes a number {allowed}, not {value}.")
    import torch

    from hstu_cli.commands.opening import open_dataset, open_run
    from hstu_cli.config import DEFAULT_PRESET, MODEL_PRESETS, TASKS, resolve_model_config
    from hstu_cli.data.dataset import format_time
    from hstu_cli.kernels.fused_layer import RECOMPUTE
    from hstu_cli.report import format_value
    from hstu_cli.training.folder import RunFolder
    from hstu_cli.training.options import TrainingOptions
    from hstu_cli.training.periods import open_periods
    from hstu_cli.training.run import TrainingRun, Watcher
    from hstu_cli.training.setup import new_model, set_recompute
    from hstu_cli.training.trainer import Trainer

    if recompute not in RECOMPUTE:
        raise UsageError(f"--recompute takes {', '.join(RECOMPUTE)}, not {recompute!r}.")
    if recompute != "none" and impl == "reference":
        raise UsageError(f"--recompute {recompute}: implementation 'reference' keeps everything; choose auto.")
    model_config = resolve_model_config(config) if config is not None else MODEL_PRESETS[DEFAULT_PRESET]
    opened = open_run(
        "train",
        args,
        device=device,
        require_device=require_device,
        dtype=dtype,
        impl=impl,
        json_only=format is options.OutputFormat.json,
        output_json=output_json,
        metadata=metadata,
        gradients=True,
    )
    reporter, backend = opened.reporter, opened.backend
    if opened.dtype == torch.float16:
        raise UsageError("--dtype fp16: gradients would underflow. Train in bf16 or fp32.")
    prepared = open_dataset(dataset, data_root, reporter)
    periods = open_periods(prepared, model_config, until_ms=until_ms, from_ms=from_ms)
    for task, reason in periods.left_out.items():
        reporter.warn(f"{task} is left out of the loss: {reason}.")
    chosen = TrainingOptions(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        dropout=dropout,
        id_dropout=id_dropout,
        next_item_weight=next_item_weight,
        num_negatives=num_negatives,
        seed=seed,
    )
    settings = {
        **{name.replace("_", "-"): value for name, value in asdict(chosen).items()},
        **{f"model.{name}": value for name, value in model_config.to_dict().items()},
        "data": str(prepared.path.resolve()),
        "data prepared at": prepared.metadata.get("prepared_at"),
        "until": format_time(periods.until_ms),
        "from": format_time(periods.from_ms),
        "dtype": reporter.record["device"]["dtype"],
        "impl": opened.impl.name,
    }
    with RunFolder(out) as folder:
        state = folder.read_state(settings, resume=resume)
        model = new_model(prepared, model_config, periods.training, backend, seed)
        trainer = Trainer(
            model, periods.training, periods.tasks, chosen, backend, dtype=opened.dtype, impl=opened.impl.name
        )
        set_recompute(model, recompute)
        run = TrainingRun(trainer, periods.validation, folder, settings)
        if state is not None:
            run.resume(state)
            reporter.note(f"Going on after step {trainer.step:,} of {trainer.num_steps:,}.")
        elif resume:
            reporter.note(f"{out} holds no run yet: beginning one.")
        reporter.record |= {
            "dataset": {"name": prepared.name, "path": str(prepared.path)},
            "model": model_config.to_dict(),
            "tasks": [TASKS[t] for t in periods.tasks],
            "tasks_left_out": periods.left_out,
            "training": periods.training.summary() | {"until_ms": periods.until_ms},
            "validation": periods.validation.summary() | {"from_ms": periods.from_ms},
            "resumed_at_step": trainer.step if state is not None else None,
            "checkpoint": str(out),
        }
        with reporter.running(_tables) as record, reporter.progress() as progress:
            record["epochs"] = run.epochs

            def on_step(trainer: Trainer, examples_per_s: float) -> None:
                losses = ", ".join(
                    f"{name.replace('_', ' ')} {value:.4f}" for name, value in trainer.sums.means().items()
                )
                progress.stage(f"epoch {trainer.epoch_number}: {losses}")
                progress.count(trainer.sums.examples, periods.training.num_examples, f"rows, {examples_per_s:,.0f}/s")

            def on_validation(done: int, total: int) -> None:
                progress.stage(f"epoch {trainer.epoch}: validation")
                progress.count(done, total, "rows")

            def on_epoch(epoch: Mapping[str, Any]) -> None:
                names = ("ranking_loss", "next_item_loss", "mean_auc", "hit_rate_50")
                text = ", ".join(f"{name.replace('_', ' ')} {format_value(epoch[name])}" for name in names)
                reporter.note(f"epoch {epoch['epoch']}: {text}, {epoch['elapsed_s']:,.0f} s")

            try:
                run.run(Watcher(on_step, on_validation, on_epoch))
            finally:
                record |= {"best_epoch": run.best and run.best["epoch"], "elapsed_s": run.elapsed_s}


def _tables(record: Mapping[str, Any]) -> "list[Table]":
    from rich.table import Table

    from hstu_cli.report import format_value, key_value_table

    device, best = record["device"], record["best_epoch"]
    overview = key_value_table(
        "hstu train" + ("" if record["status"] == "valid" else f" ({', '.join(record['reasons'])})"),
        {
            "Data": f"{record['dataset']['name']} ({record['dataset']['path']})",
            "Training": "{num_examples:,} events of {num_users:,} users".format(**record["training"]),
            "Validation": "{num_examples:,} events of {num_users:,} users".format(**record["validation"]),
            "Tasks": ", ".join(record["tasks"]),
            "Device": f"{device['name']} ({device['actual']}), {device['dtype']}",
            "Best epoch": best,
            "Checkpoint": record["checkpoint"] if best else None,
            "Time": f"{record['elapsed_s']:,.0f} s",
        },
    )
    tasks = [task for task in record["tasks"] if any(row[f"auc_{task}"] is not None for row in record["epochs"])]
    columns = {
        "epoch": "epoch",
        "ranking loss": "ranking_loss",
        "next-item loss": "next_item_loss",
        "AUC": "mean_auc",
        **{f"AUC {task}": f"auc_{task}" for task in tasks[:MOST_TASKS]},
        **{f"HR@{k}": f"hit_rate_{k}" for k in (10, 50)},
    }
    epochs = Table(title="Validation after each epoch", title_justify="left")
    for name in columns:
        epochs.add_column(name, justify="right")
    for row in record["epochs"]:
        values = (format_value(row[column]) for column in columns.values())
        epochs.add_row(*values, style="bold" if row["epoch"] == best else None)
    return [overview, epochs] if record["epochs"] else [overview]
