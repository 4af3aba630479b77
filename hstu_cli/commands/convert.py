"""`hstu convert`: any checkpoint that can be read, in the native form."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hstu_cli.commands import options
from hstu_cli.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLE = "Example: hstu convert exported/ model/ --config kuairand.json"


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A checkpoint: recsys-examples, state dict, native.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write, new or empty.")],
    config: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="A preset, or a config.json with what the tensors do not tell."),
    ] = None,
    format: options.Format = options.OutputFormat.rich,
    output_json: options.OutputJson = None,
    metadata: options.Metadata = None,
    verbose: options.Verbose = False,
) -> None:
    """Write a checkpoint from elsewhere as config.json and model.safetensors."""
    args = dict(locals())
    from hstu_cli.commands.opening import open_checkpoint
    from hstu_cli.model.checkpoint import save_checkpoint
    from hstu_cli.report import Reporter, environment, parse_metadata

    reporter = Reporter(
        "convert",
        args,
        json_only=format is options.OutputFormat.json,
        output_json=output_json,
        metadata=parse_metadata(metadata or []),
    )
    reporter.record |= {"env": environment(), "device": None}
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists already and is not an empty folder. Name a new one.")
    loaded = open_checkpoint(source, config)
    with reporter.running(_tables) as record:
        model = loaded.model
        record |= {
            "kind": loaded.kind,
            "num_ignored": loaded.num_ignored,
            "model": model.config.to_dict(),
            "tables": {name: table.num_rows for name, table in model.embeddings.items()},
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "path": str(target),
        }
        save_checkpoint(model, target)


def _tables(record: Mapping[str, Any]) -> "list[Table]":
    from rich.table import Table

    from hstu_cli.report import format_value, key_value_table

    model = record["model"]
    rows = {
        "From": f"{record['args']['source']} ({record['kind']})",
        "To": record["path"],
        "Layers, width, heads": f"{model['num_layers']}, {model['hidden_dim']}, "
        f"{model['num_heads']} x {model['head_dim']}",
        "Parameters": record["num_parameters"],
        "Entries that inference does not need": record["num_ignored"],
    }
    tables = Table("Table", title="Embeddings", title_justify="left")
    tables.add_column("Rows", justify="right")
    for name, count in record["tables"].items():
        tables.add_row(name, format_value(count))
    return [key_value_table("hstu convert", rows), tables]
