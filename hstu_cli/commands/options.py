"""Options that commands share, declared once, and how a command ends."""

import functools
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer

from hstu_cli.config import KUAIRAND_TIMEZONE
from hstu_cli.errors import HstuError, RunError, UsageError

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
"""As a shell reports a process that SIGTERM ended: what a container or a batch system stops its jobs with."""


class OutputFormat(StrEnum):
    """What stdout carries."""

    rich = "rich"
    json = "json"


DEVICE_HELP = "auto, cpu, cuda[:N], npu[:N], or a GPU's name: l20, l40s, a100, h100, h200, b200."

Device = Annotated[str, typer.Option(help=DEVICE_HELP)]
RequireDevice = Annotated[
    bool, typer.Option("--require-device", help="Fail where the GPU that --device names is absent.")
]
Dtype = Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16; auto is fp32 on a CPU, bf16 elsewhere.")]
Impl = Annotated[
    str, typer.Option(help="Implementation of the operators: auto, reference, blocked, native, triton or ascend.")
]
TrainingImpl = Annotated[
    str,
    typer.Option(
        help="Implementation of the operators and their gradients: auto, reference, blocked, native or triton."
    ),
]
LayerImpl = Annotated[str, typer.Option(help="Implementation of the layer: auto, blocked, native or triton.")]
AppendImpl = Annotated[
    str,
    typer.Option(
        help="What writes new keys and values into pages: triton, flashinfer, native, torch, or auto, "
        "which follows --impl where that is given (reference, blocked, ascend: torch)."
    ),
]
Embedding = Annotated[str, typer.Option(help="What looks embeddings up: auto (torch), torch, torchrec or dynamicemb.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of everything random.")]
Config = Annotated[
    str | None, typer.Option(metavar="NAME|FILE", help="Model: kuairand_gr, tiny, benchmark, or a config.json.")
]
Dataset = Annotated[str | None, typer.Option(help="pure, 1k, 27k or synthetic; without it, the one prepared last.")]
DataRoot = Annotated[
    Path | None,
    typer.Option(help="Folder of prepared data; else $HSTU_HOME, ./tmp_data if it holds some, or your cache folder."),
]
Warmup = Annotated[int, typer.Option("--num-iters-warmup", min=0, help="Rounds before the timed ones.")]
Iterations = Annotated[int, typer.Option("--num-iters", min=1, help="Timed rounds; all cases take turns in each.")]
Profile = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Also write traces here, for Perfetto or chrome://tracing.")
]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the result: .png, .svg or .html.")]
Full = Annotated[bool, typer.Option("--full", help="Run everything, however long it takes on a CPU.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the cases with FLOPs, bytes and memory; run none.")]
Format = Annotated[OutputFormat, typer.Option(help="rich: tables, then the JSON summary; json: one JSON object.")]
OutputJson = Annotated[Path | None, typer.Option(help="Also write the whole JSON record to this file.")]
Metadata = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Put this into the record; repeatable.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the traceback of an error.")]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command its ending: a known error, or lack of memory, is one message and its exit code.

    Ctrl-C and SIGTERM interrupt it at any line; their codes are 130 and 143.
    """

    @functools.wraps(function)
    def run(**options: Any) -> None:
        terminations: list[int] = []
        try:
            with _sigterm_as_interrupt(terminations):
                function(**options)
        except (HstuError, MemoryError, RuntimeError) as error:
            known = error if isinstance(error, HstuError) else _out_of_memory(error)
            if known is None:
                raise
            if options.get("verbose"):
                traceback.print_exc()
            typer.secho(f"Error: {known}", fg=typer.colors.RED, err=True)
            raise typer.Exit(known.exit_code) from error
        except KeyboardInterrupt as interrupt:
            typer.echo("Terminated." if terminations else "Interrupted.", err=True)
            raise typer.Exit(EXIT_TERMINATED if terminations else EXIT_INTERRUPTED) from interrupt

    return run


@contextmanager
def _sigterm_as_interrupt(received: list[int]) -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, so that it ends a run as Ctrl-C does.

    received: the signals that came; noted beside the exception, as libraries that notice it in loops of their own raise
    another one. A handler that somebody else has installed stays, and so does the choice to ignore the signal.
    """

    def interrupt(number: int, frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    is_ours = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if is_ours:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _out_of_memory(error: MemoryError | RuntimeError) -> RunError | None:
    """What to tell of an allocator's error; None of any other. By its name: torch may not be loaded."""
    says_so = "can't allocate memory" in str(error)
    if not (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or says_so):
        return None
    what = next(iter(str(error).splitlines()), "") or type(error).__name__
    return RunError(f"Memory did not suffice ({what}). Take a smaller batch, cache or model, or another device.")


def check_outputs(*, dry_run: bool, plot: Path | None, profile: Path | None, output_json: Path | None) -> None:
    """UsageError for what a benchmark would leave out or overwrite in silence."""
    for option, path, verb in (("--plot", plot, "plot"), ("--profile", profile, "trace")):
        if dry_run and path is not None:
            raise UsageError(f"{option} with --dry-run: nothing runs, so there is nothing to {verb}. Drop one of them.")
    if plot is not None and output_json is not None and plot.resolve() == output_json.resolve():
        raise UsageError("--plot and --output-json name the same file.")


MOST_COUNT = 1_000_000


def parse_counts(option: str, text: str, *, least: int) -> tuple[int, ...]:
    """A comma-separated list of whole numbers, in order and once each; UsageError beyond `least` and a million."""
    try:
        values = [int(item) for item in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} takes whole numbers separated by commas, not {text!r}.") from error
    for value in values:
        if not least <= value <= MOST_COUNT:
            raise UsageError(f"{option} takes numbers from {least} to {MOST_COUNT:,}, not {value}.")
    return tuple(dict.fromkeys(values))


def parse_shares(option: str, text: str) -> tuple[int | Fraction, ...]:
    """A comma-separated list of whole numbers and of shares such as 31/32; UsageError for anything else."""
    values: list[int | Fraction] = []
    for item in text.split(","):
        try:
            value = Fraction(item.strip()) if "/" in item else int(item)
        except (ValueError, ZeroDivisionError) as error:
            raise UsageError(
                f"{option} takes tokens or shares such as 31/32, separated by commas, not {text!r}."
            ) from error
        if value < 0 or (isinstance(value, Fraction) and value > 1):
            raise UsageError(f"{option} takes tokens from 0 or shares from 0 to 1, not {item.strip()}.")
        values.append(value)
    return tuple(dict.fromkeys(values))


def parse_date(option: str, text: str | None) -> int | None:
    """A date or date and time in UTC+8, KuaiRand's own, as milliseconds since 1970."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(f"{option} takes a date such as 2022-04-25 or 2022-04-25T18:00, not {text!r}.") from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=KUAIRAND_TIMEZONE)
    return round(moment.timestamp() * 1000)
