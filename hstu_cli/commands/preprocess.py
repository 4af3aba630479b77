"""`hstu preprocess kuairand`: raw KuaiRand logs, or synthetic users, into a prepared data set."""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hstu_cli.commands import options
from hstu_cli.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLE = "Example: hstu preprocess kuairand --dataset pure --data-root tmp_data"
YEAR_S = 365 * 86_400


def kuairand(
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", "--dataset-name", help="pure, 1k or 27k; KuaiRand-1K and the like work too."),
    ] = None,
    data_root: options.DataRoot = None,
    archive: Annotated[Path | None, typer.Option(help="Use this .tar.gz instead of downloading.")] = None,
    md5: Annotated[str | None, typer.Option(help="Expected MD5, where the archive is not the official one.")] = None,
    base_url: Annotated[str | None, typer.Option(help="Download from here instead of Zenodo.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use what was downloaded before; no network.")] = False,
    time_interval_s: Annotated[
        int, typer.Option(min=1, max=YEAR_S, help="Events less than this after a request's first belong to it.")
    ] = 300,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Keep one of rows that are equal in every column.")
    ] = False,
    synthetic: Annotated[bool, typer.Option("--synthetic", help="Generate users instead; needs no download.")] = False,
    users: Annotated[int | None, typer.Option(min=1, max=10**8, help="Synthetic users; 50 if not given.")] = None,
    events: Annotated[
        int | None, typer.Option(min=1, max=10**7, help="Synthetic events per user (shape pure: on average); 40.")
    ] = None,
    items: Annotated[int | None, typer.Option(min=1, max=10**9, help="Synthetic videos; 1000.")] = None,
    shape: Annotated[
        Literal["pure", "1k"] | None,
        typer.Option(help="Synthetic users' shape. pure: a few events a day; 1k: sessions of about 80 events."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Seed of the synthetic users; 0.")] = None,
    format: options.Format = options.OutputFormat.rich,
    output_json: options.OutputJson = None,
    metadata: options.Metadata = None,
    verbose: options.Verbose = False,
) -> None:
    """Prepare a KuaiRand data set: download, verify, sort, and cut into requests."""
    args = dict(locals())
    from hstu_cli.data import layout
    from hstu_cli.data.kuairand import KuaiRandOptions, count_warnings, prepare_kuairand
    from hstu_cli.data.synthetic import SyntheticOptions, prepare_synthetic
    from hstu_cli.hardware import cpu_name
    from hstu_cli.report import Reporter, environment, parse_metadata

    name = _which_dataset(dataset, synthetic)
    generated = {"num_users": users, "num_events": events, "num_items": items, "shape": shape, "seed": seed}
    generated = {field: value for field, value in generated.items() if value is not None}
    if name != layout.SYNTHETIC and generated:
        raise UsageError("--users, --events, --items, --shape and --seed are for --synthetic.")
    if md5 is not None and not re.fullmatch("[0-9a-fA-F]{32}", md5):
        raise UsageError(f"--md5 takes 32 hexadecimal digits, not {md5!r}.")
    if name == layout.SYNTHETIC and (archive or md5 or base_url or offline or drop_duplicates):
        raise UsageError("--archive, --md5, --base-url, --offline and --drop-duplicates are for KuaiRand's files.")
    if archive and (base_url or offline):
        raise UsageError("--archive is a file on this machine: --base-url and --offline do not go with it.")
    reporter = Reporter(
        "preprocess kuairand",
        args,
        json_only=format is options.OutputFormat.json,
        output_json=output_json,
        metadata=parse_metadata(metadata or []),
    )
    root = layout.data_root(data_root)
    start = time.perf_counter()
    with reporter.progress() as progress:
        if name == layout.SYNTHETIC:
            prepared = prepare_synthetic(
                root,
                SyntheticOptions(**generated, interval_ms=1000 * time_interval_s),
                on_stage=progress.stage,
            )
        else:
            prepared = prepare_kuairand(
                name,
                root,
                KuaiRandOptions(
                    archive=archive,
                    md5=md5.lower() if md5 else None,
                    base_url=base_url or layout.DEFAULT_BASE_URL,
                    offline=offline,
                    interval_ms=1000 * time_interval_s,
                    drop_duplicates=drop_duplicates,
                ),
                on_stage=progress.stage,
                on_download=progress.bytes,
            )
    for warning in count_warnings(prepared):
        reporter.warn(warning)
    with reporter.running(_tables) as record:
        record["env"] = environment()
        record["device"] = {
            "requested": None,
            "actual": "cpu",
            "name": cpu_name(),
            "dtype": None,
            "impl": None,
            "impl_reason": "preparation runs on the CPU",
        }
        record["dataset"] = {"name": name, "path": str(root / name)}
        record["warnings"] = count_warnings(prepared)
        record |= {key: value for key, value in prepared.items() if key not in NOT_IN_RECORD}
        record["num_categories"] = {feature: len(ids) for feature, ids in prepared["category_maps"].items()}
        record["elapsed_s"] = time.perf_counter() - start


NOT_IN_RECORD = ("schema_version", "dataset", "category_maps")
"""Parts of a data set's metadata that its record names otherwise."""


def _which_dataset(dataset: str | None, synthetic: bool) -> str:
    """The data set that the options mean; UsageError where they mean none, or two."""
    from hstu_cli.data.layout import RELEASES, SYNTHETIC, dataset_name

    if dataset is None:
        if synthetic:
            return SYNTHETIC
        raise UsageError(f"Name one: --dataset {', '.join(RELEASES)} (or pure, 1k, 27k); or --synthetic.")
    name = dataset_name(dataset)
    if synthetic and name != SYNTHETIC:
        raise UsageError(f"--synthetic and --dataset {dataset} exclude each other.")
    return name


def _tables(record: Mapping[str, Any]) -> "list[Table]":
    from hstu_cli.report import key_value_table

    rows = {
        "Folder": record["dataset"]["path"],
        "Rows read": record["num_rows_read"],
        **{f"Dropped: {reason.replace('_', ' ')}": n for reason, n in record["dropped_rows"].items()},
        "Events": record["num_events"],
        "Users with events": record["num_users_with_events"],
        "Users": record["num_users"],
        "Videos": record["vocabulary_size"],
        f"Requests ({record['time_interval_s']:g} s)": record["num_requests"],
        "Longest history": record["longest_history"],
        "Seconds": round(record["elapsed_s"], 2),
    }
    return [key_value_table(f"{record['dataset']['name']}: prepared", rows)]
