"""The `hstu` command line: wires the commands, and does nothing else."""

import os
from typing import Annotated

import typer

from hstu_cli import __version__
from hstu_cli.commands import bench_e2e, bench_fused, bench_layer, compare, convert, env, infer, preprocess, train
from hstu_cli.commands.options import command


def _accept_underscores(name: str) -> str:
    """`--data_root` is `--data-root`, as in the tools that users come from."""
    return name.replace("_", "-")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hstu {__version__}")
        raise typer.Exit


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": _accept_underscores, "help_option_names": ["-h", "--help"]},
    help="HSTU ranking models: prepare KuaiRand, train, replay requests, measure.",
    epilog="Example: hstu infer --config tiny --steps 20",
)


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """HSTU ranking models: prepare KuaiRand, train, replay requests, measure."""
    # Else `import torch` loads torch_npu wherever it is installed, and fails where that does; the npu backend loads it.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


preprocess_app = typer.Typer(no_args_is_help=True, help="Turn raw logs into sequences and a request timeline.")
preprocess_app.command("kuairand", epilog=preprocess.EXAMPLE)(command(preprocess.kuairand))
app.add_typer(preprocess_app, name="preprocess")
app.command("infer", epilog=infer.EXAMPLE)(command(infer.infer))
app.command("train", epilog=train.EXAMPLE)(command(train.train))
app.command("bench-layer", epilog=bench_layer.EXAMPLE)(command(bench_layer.bench_layer))
app.command("bench-e2e", epilog=bench_e2e.EXAMPLE)(command(bench_e2e.bench_e2e))
app.command("bench-fused", epilog=bench_fused.EXAMPLE)(command(bench_fused.bench_fused))
app.command("compare", epilog=compare.EXAMPLE)(command(compare.compare))
app.command("convert", epilog=convert.EXAMPLE)(command(convert.convert))
app.command("env", epilog=env.EXAMPLE)(command(env.env))
