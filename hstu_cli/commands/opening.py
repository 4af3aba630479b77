"""What commands on a model do before their work: resolve the device, and begin the record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hstu_cli.backend import BACKENDS, DTYPES, Backend, DeviceChoice, open_device, resolve_dtype
from hstu_cli.config import ModelConfig
from hstu_cli.errors import UsageError
from hstu_cli.kernels.attention.ascend import why_not_page_size
from hstu_cli.kernels.attention.block_rows import block_rows_by_hand
from hstu_cli.kernels.dispatch import AUTO, ImplChoice, check_possible, choose_impl
from hstu_cli.model.graphs import why_not_captured
from hstu_cli.report import Reporter, environment, parse_metadata

if TYPE_CHECKING:
    from hstu_cli.data.dataset import PreparedDataset
    from hstu_cli.model.checkpoint import LoadedCheckpoint


@dataclass(frozen=True, slots=True)
class Opened:
    """A device with a dtype and an implementation, and the reporter whose record names them."""

    reporter: Reporter
    choice: DeviceChoice
    dtype: torch.dtype
    impl: ImplChoice

    @property
    def backend(self) -> Backend:
        """The device itself."""
        return self.choice.backend


def open_run(
    command: str,
    args: Mapping[str, Any],
    *,
    device: str,
    require_device: bool,
    dtype: str,
    impl: str,
    json_only: bool,
    output_json: Path | None,
    metadata: Sequence[str] | None,
    gradients: bool = False,
    refused_impls: Mapping[str, str] | None = None,
    page_size: int | None = None,
    cuda_graph: bool = False,
) -> Opened:
    """Resolve the shared options, in the order in which their errors matter; warn where a preset's GPU is absent.

    gradients: the command needs an implementation that has them. refused_impls: those that it does not take, each
    with what is said of it. page_size: of the cache, where there is one and the command line says so. cuda_graph:
    graphs are asked for. UsageError for what the command line and `HSTU_BLOCK_ROWS` alone make impossible, which comes
    before what is absent.
    """
    kind = next((kind for kind in BACKENDS if kind.type == device.lower().partition(":")[0]), None)
    if kind is not None:
        check_possible(impl, kind.type, gradients=gradients, refused=refused_impls)
        if cuda_graph and impl != AUTO and kind.has_graphs and (reason := why_not_captured(impl, kind)):
            raise UsageError(f"--cuda-graph: {reason}.")
    if impl == "ascend" and page_size is not None and (reason := why_not_page_size(page_size)):
        raise UsageError(f"--page-size {page_size}: {reason}.")
    choice = open_device(device, require=require_device)
    backend = choice.backend
    backend.tune_process()
    dtype_name = resolve_dtype(dtype, backend)
    implementation = choose_impl(impl, backend.type, gradients=gradients, refused=refused_impls)
    if implementation.name == "blocked" and backend.few_shapes:
        block_rows_by_hand()  # refused before hours of work
    reporter = Reporter(
        command, args, json_only=json_only, output_json=output_json, metadata=parse_metadata(list(metadata or []))
    )
    if choice.warning:
        reporter.warn(choice.warning)
    reporter.record |= {
        "env": environment(backend.device_name, backend.memory_bytes),
        "device": {
            "requested": choice.requested,
            "actual": str(backend.device),
            "name": backend.device_name,
            "dtype": dtype_name,
            "impl": implementation.name,
            "impl_reason": implementation.reason,
        },
    }
    return Opened(reporter, choice, DTYPES[dtype_name], implementation)


def note_block_rows(opened: Opened, config: ModelConfig) -> None:
    """Have the strips of blocked attention measured for this model's heads where that is done; the record says them.

    Before anything is timed or captured.
    """
    if opened.impl.name != "blocked" or not opened.backend.few_shapes:
        return
    from hstu_cli.kernels.attention.bucketed import block_rows_for

    chosen = block_rows_for(opened.backend.device, opened.dtype, config.num_heads, config.head_dim)
    opened.reporter.record["device"] |= {"block_rows": chosen.num_rows, "block_rows_reason": chosen.reason}


def strips_line(device: Mapping[str, Any]) -> dict[str, str]:
    """What `note_block_rows` found, as a line of a table; none where it had nothing to find."""
    if "block_rows" not in device:
        return {}
    return {"Strips of attention": f"{device['block_rows']:,} rows ({device['block_rows_reason']})"}


def open_checkpoint(path: Path, config: str | None) -> "LoadedCheckpoint":
    """Read the checkpoint of `--checkpoint` with the `--config` that goes with it, if any."""
    from hstu_cli.config import resolve_config_fields, resolve_model_config
    from hstu_cli.model.checkpoint import read_checkpoint
    from hstu_cli.model.recsys_examples import is_recsys_examples

    # Only there may a configuration leave open what the tensors tell.
    resolve = resolve_config_fields if is_recsys_examples(path) else resolve_model_config
    return read_checkpoint(path, config=resolve(config) if config is not None else None)


def open_dataset(dataset: str | None, data_root: Path | None, reporter: Reporter) -> "PreparedDataset":
    """The data set that the options mean; where they name nothing and there is none, a synthetic one."""
    from hstu_cli.data.dataset import PreparedDataset, last_prepared
    from hstu_cli.data.layout import SYNTHETIC, dataset_name, prepare_command
    from hstu_cli.data.layout import data_root as resolve_root
    from hstu_cli.errors import InputError

    root = resolve_root(data_root)
    if dataset is not None:
        return PreparedDataset(root, dataset_name(dataset))
    name = last_prepared(root)
    if name is not None:
        return PreparedDataset(root, name)
    if data_root is not None:
        raise InputError(f"{root} holds no prepared data set. Prepare one with: {prepare_command('pure', root)}")
    from hstu_cli.data.synthetic import SyntheticOptions, prepare_synthetic

    reporter.warn(f"Nothing is prepared under {root}: using seeded synthetic users, made there now.")
    prepare_synthetic(root, SyntheticOptions())
    return PreparedDataset(root, SYNTHETIC)
