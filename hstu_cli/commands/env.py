"""`hstu env`: what this machine has, and the reason for whatever is missing."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hstu_cli.commands import options

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLE = "Example: hstu env --format json"


BuildKernels = Annotated[
    bool, typer.Option("--build-kernels", help="Build the native CPU kernels now; again if that failed before.")
]


def env(
    build_kernels: BuildKernels = False,
    format: options.Format = options.OutputFormat.rich,
    output_json: options.OutputJson = None,
    metadata: options.Metadata = None,
    verbose: options.Verbose = False,
) -> None:
    """Show backends, operator implementations, embeddings and versions on this machine."""
    args = dict(locals())
    from hstu_cli.backend import BACKENDS, open_device
    from hstu_cli.errors import UnavailableError
    from hstu_cli.kernels.attention.ascend import why_unavailable as why_no_ascend
    from hstu_cli.kernels.dispatch import IMPLEMENTATIONS, choose_impl
    from hstu_cli.kernels.native.build import native_state
    from hstu_cli.kernels.triton.state import triton_state
    from hstu_cli.model.lookups import EMBEDDINGS, why_unavailable
    from hstu_cli.report import Reporter, environment, parse_metadata

    native = native_state(build=build_kernels, retry=build_kernels)
    if build_kernels and not native.available:
        raise UnavailableError(f"--build-kernels: {native.reason}.")
    reporter = Reporter(
        "env",
        args,
        json_only=format is options.OutputFormat.json,
        output_json=output_json,
        metadata=parse_metadata(metadata or []),
    )
    with reporter.running(_tables) as record:
        backend = open_device("auto").backend
        implementation = choose_impl("auto", backend.type, build=False)
        record["env"] = environment(backend.device_name, backend.memory_bytes)
        record["device"] = {
            "requested": "auto",
            "actual": str(backend.device),
            "name": backend.device_name,
            "dtype": backend.default_dtype,
            "impl": implementation.name,
            "impl_reason": implementation.reason,
        }
        record["backends"] = {kind.type: _describe(kind) for kind in BACKENDS}
        operators = ("hstu_attention", "hstu_paged_attention")
        absent = why_no_ascend()
        record["ascend"] = {"available": absent is None, "reason": absent or "the operators of RecSDK are loaded"}
        record["native"] = asdict(native)
        record["triton"] = asdict(triton_state())
        record["implementations"] = {operator: list(IMPLEMENTATIONS) for operator in operators}
        no_graphs = backend.why_no_graphs()
        record["cuda_graph"] = {"available": no_graphs is None, "reason": no_graphs}
        reasons = {name: why_unavailable(name, backend.type) for name in EMBEDDINGS}
        record["embeddings"] = {
            name: {"available": reason is None, "reason": reason} for name, reason in reasons.items()
        }


def _describe(kind: Any) -> dict[str, Any]:
    """Whether a backend works here: its devices, or what is missing."""
    reason = kind.why_unavailable()
    devices = [] if reason else [kind(number).device_name for number in range(kind.device_count())]
    return {"available": reason is None, "devices": devices, "reason": reason}


def _tables(record: Mapping[str, Any]) -> "list[Table]":
    from hstu_cli.report import key_value_table

    if record["status"] == "invalid":  # what is found last is missing, and the reason is told
        return []
    backends = {
        name: ", ".join(backend["devices"]) if backend["available"] else f"absent: {backend['reason']}"
        for name, backend in record["backends"].items()
    }
    device = record["device"]
    chosen = {"auto": f"{device['actual']}, {device['dtype']}, {device['impl']} ({device['impl_reason']})"}
    embeddings = {
        name: "available" if embedding["available"] else f"absent: {embedding['reason']}"
        for name, embedding in record["embeddings"].items()
    }
    operators = {name: ", ".join(impls) for name, impls in record["implementations"].items()}
    for name in ("native", "triton", "ascend"):
        state = record[name]
        operators[name] = state["reason"] if state["available"] else f"absent: {state['reason']}"
    graphs = record["cuda_graph"]
    operators["graphs"] = "available" if graphs["available"] else f"absent: {graphs['reason']}"
    return [
        key_value_table("Backends", backends | chosen),
        key_value_table("Operators", operators),
        key_value_table("Embeddings", embeddings),
        key_value_table("Versions and machine", record["env"]),
    ]
