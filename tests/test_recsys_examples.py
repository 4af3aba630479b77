"""Checkpoints of recsys-examples: written byte for byte by their rules, read, converted, damaged."""

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.cli import failure_of, invoke, record_of
from support.recsys_folder import DUMPS, write_recsys_folder

from hstu_cli.config import MODEL_PRESETS
from hstu_cli.data.dataset import PreparedDataset
from hstu_cli.data.synthetic import SyntheticOptions, prepare_synthetic
from hstu_cli.errors import InputError, UsageError
from hstu_cli.model import RankingModel, load_checkpoint
from hstu_cli.model.dynamicemb_dump import find_dumps, read_table
from hstu_cli.model.engine import InferenceEngine
from hstu_cli.model.ranking import random_model
from hstu_cli.model.tokens import UserRequest

CONFIG = dataclasses.replace(
    MODEL_PRESETS["tiny"],
    num_layers=2,
    contextual_features=("user_id", "user_active_degree", "register_days_range"),
)
SIZES = {"user_active_degree": 5, "register_days_range": 3, "action_weights": 256}
DYNAMIC = ("video_id", "user_id")
SMALL = ("register_days_range", "action_weights", "user_active_degree")
OPEN = {
    "num_heads": 2,
    "max_history": 64,
    "max_candidates": 32,
    "scaling_seqlen": 198,
    "contextual_features": list(CONFIG.contextual_features),
    "tables": SIZES,
}
"""All that the tensors do not tell."""


@pytest.fixture
def model() -> RankingModel:
    generator = torch.Generator().manual_seed(1)
    ids = {
        "video_id": torch.randperm(1000, generator=generator)[:40] + (1 << 40),
        "user_id": torch.tensor([7, 3, 900]),
    }
    made = random_model(CONFIG, ids, SIZES, seed=0)
    with torch.no_grad():
        for parameter in made.parameters():  # biases and norms too, which begin equal
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def folder_of(model: RankingModel, path: Path, kind: str = "fused", world_size: int = 1) -> Path:
    return write_recsys_folder(model, path / "foreign", dynamic=DYNAMIC, small=SMALL, kind=kind, world_size=world_size)


def scores(model: RankingModel) -> np.ndarray:
    """Logits of a known and an unknown user, over known and unknown videos."""
    videos = torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:40].numpy() + (1 << 40)
    actions = np.arange(20) * 11 % 256
    requests = [
        UserRequest(7, np.array([7, 4, 2]), videos[:20], actions, videos[20:30]),
        UserRequest(5, np.array([5, 0, 1]), videos[5:15], actions[:10], np.array([3, videos[0]])),
    ]
    return InferenceEngine(model).step(requests).logits


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("kind", ["fused", "native"])
def test_scores_equal_those_of_the_native_form(kind: str, world_size: int, model: RankingModel, tmp_path: Path) -> None:
    loaded = load_checkpoint(folder_of(model, tmp_path, kind, world_size), config=OPEN)
    assert loaded.config == CONFIG
    np.testing.assert_array_equal(scores(loaded), scores(model))


def test_layouts_are_told_apart(model: RankingModel, tmp_path: Path) -> None:
    """The rows of the native kind in our order would be other weights."""
    loaded = load_checkpoint(folder_of(model, tmp_path, "native"), config=OPEN)
    for i in range(CONFIG.num_layers):
        assert torch.equal(loaded.layers[i].uvqk.weight, model.layers[i].uvqk.weight)
        assert torch.equal(loaded.layers[i].output.weight, model.layers[i].output.weight)


def test_convert_writes_the_native_form(model: RankingModel, tmp_path: Path) -> None:
    source = folder_of(model, tmp_path, "fused", 2)
    (tmp_path / "open.json").write_text(json.dumps(OPEN))
    record = record_of("convert", source, tmp_path / "native", "--config", tmp_path / "open.json")
    assert record["kind"] == "recsys-examples"
    # One dynamic key and the optimizer in the rank's file; scores of two ranks and options for each dynamic table.
    assert record["num_ignored"] == 2 + 2 * 2 + 2
    assert record["tables"]["video_id"] == 40
    native = load_checkpoint(tmp_path / "native")
    np.testing.assert_array_equal(scores(native), scores(model))


def test_a_preset_tells_what_is_open_but_not_the_sizes_of_several_tables(model: RankingModel, tmp_path: Path) -> None:
    folder = folder_of(model, tmp_path)
    with pytest.raises(UsageError, match="under tables: register_days_range, user_active_degree"):
        load_checkpoint(folder, config=OPEN | {"tables": {"action_weights": 256}})
    one_open = OPEN | {"tables": {k: v for k, v in SIZES.items() if k != "user_active_degree"}}
    np.testing.assert_array_equal(scores(load_checkpoint(folder, config=one_open)), scores(model))


@pytest.mark.parametrize("name", ["num_heads", "scaling_seqlen", "max_history", "contextual_features"])
def test_what_is_still_open_is_named(name: str, model: RankingModel, tmp_path: Path) -> None:
    folder = folder_of(model, tmp_path)
    fields = tmp_path / "open.json"
    fields.write_text(json.dumps({k: v for k, v in OPEN.items() if k != name}))
    assert f"do not tell {name}" in failure_of(2, "convert", folder, tmp_path / "out", "--config", fields)


@pytest.mark.parametrize(
    "tables", [[5, 3], {"action_weights": "many"}, {"action_weights": -256}, {"action_weights": True}]
)
def test_sizes_that_are_none_are_refused(tables: object, model: RankingModel, tmp_path: Path) -> None:
    fields = tmp_path / "open.json"
    fields.write_text(json.dumps(OPEN | {"tables": tables}))
    message = failure_of(4, "convert", folder_of(model, tmp_path), tmp_path / "out", "--config", fields)
    assert "tables must give the rows" in message


def test_misshaped_weights_of_the_native_kind_are_listed(model: RankingModel, tmp_path: Path) -> None:
    folder = folder_of(model, tmp_path, "native")
    path = folder / "torch_module" / "model.0.pth"
    content = torch.load(path, weights_only=True)
    content["model_state_dict"]["_hstu_block._attention_layers.1._linear_uvqk.weight"] = torch.zeros(7, 64)
    content["model_state_dict"]["_hstu_block._attention_layers.1._linear_uvqk.bias"] = torch.tensor(1.0)
    torch.save(content, path)
    with pytest.raises(InputError, match=r"layers.1.uvqk.bias is \[\](.|\n)*layers.1.uvqk.weight is \[7, 64\]"):
        load_checkpoint(folder, config=OPEN)


def test_an_id_beyond_a_context_table_takes_row_0(model: RankingModel, tmp_path: Path) -> None:
    loaded = load_checkpoint(folder_of(model, tmp_path), config=OPEN)
    table = loaded.embeddings["user_active_degree"]
    rows = table(torch.tensor([0, 4, 5, 99]))
    assert torch.equal(rows[2], rows[0])
    assert torch.equal(rows[3], rows[0])
    assert not torch.equal(rows[1], rows[0])
    assert torch.equal(rows[1], model.embeddings["user_active_degree"].weight[4])


def damaged(name: str, folder: Path) -> None:
    """Spoil one thing of a folder of two ranks."""
    dense, dumps = folder / "torch_module", folder / DUMPS
    keys = dumps / "video_id_emb_keys.rank_1.world_size_2"
    values = dumps / "video_id_emb_values.rank_1.world_size_2"
    content = torch.load(dense / "model.0.pth", weights_only=True)
    state = content["model_state_dict"]
    layer = "_hstu_block._attention_layers.1."
    match name:
        case "rank file missing":
            (dense / "model.0.pth").unlink()
            return
        case "dump missing":
            values.unlink()
        case "world sizes differ":
            keys.rename(dumps / "video_id_emb_keys.rank_1.world_size_3")
        case "lengths disagree":
            keys.write_bytes(keys.read_bytes()[:-8])
        case "values cut off":
            values.write_bytes(values.read_bytes()[:-3])
        case "keys cut off":
            keys.write_bytes(keys.read_bytes()[:-3])
        case "key twice":
            other = dumps / "video_id_emb_keys.rank_0.world_size_2"
            keys.write_bytes(other.read_bytes()[:8] + keys.read_bytes()[8:])
        case "unknown file":
            (dumps / "notes.txt").touch()
        case "unknown table":
            for path in (keys, values):
                for rank in (0, 1):
                    copy = path.name.replace("video_id", "hashtag").replace("rank_1", f"rank_{rank}")
                    (dumps / copy).write_bytes(b"")
        case "nan":
            state[f"{layer}_linear_uvqk_bias"][3] = torch.nan
        case "nan in a dump":
            values.write_bytes(np.float32(np.nan).tobytes() + values.read_bytes()[4:])
        case "misshaped":
            state[f"{layer}_linear_proj_weight"] = torch.zeros(3, 5)
        case "missing tensor":
            del state[f"{layer}_linear_uvqk_bias"]
        case "extra tensor":
            state["_hstu_block.surprise"] = torch.zeros(1)
        case "extra in a layer":
            state[f"{layer}surprise"] = torch.zeros(1)
        case "layer missing":
            state |= {k.replace("layers.1.", "layers.2."): state.pop(k) for k in list(state) if k.startswith(layer)}
        case "sizes":
            key = next(k for k in state if "_data_parallel_" in k)
            state[key] = state[key][:-1]
        case "no state":
            content = {"weights": state}
        case "not tensors":
            state["_mlp._mlp.0.bias"] = [1.0]
        case "not named":
            state[7] = torch.zeros(1)
    for rank in (0, 1):
        torch.save(content, dense / f"model.{rank}.pth")
    if name == "ranks disagree":
        state["_mlp._mlp.0.bias"] = state["_mlp._mlp.0.bias"] + 1
        torch.save(content, dense / "model.1.pth")
    if name == "code":
        (dense / "model.0.pth").write_bytes(pickle.dumps(pytest.fail))


def test_a_full_scratch_disk_is_one_message(model: RankingModel, tmp_path: Path) -> None:
    (tmp_path / "open.json").write_text(json.dumps(OPEN))
    arguments = [
        "convert",
        folder_of(model, tmp_path, world_size=2),
        tmp_path / "out",
        "--config",
        tmp_path / "open.json",
    ]
    code = (
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\nfrom hstu_cli.cli import app; app()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 4, done.stderr
    assert "Set TMPDIR" in done.stderr
    assert not (tmp_path / "out").exists()


def test_convert_does_not_write_over_anything(model: RankingModel, tmp_path: Path) -> None:
    (tmp_path / "open.json").write_text(json.dumps(OPEN))
    folder = folder_of(model, tmp_path)
    assert "not an empty folder" in failure_of(4, "convert", folder, folder, "--config", tmp_path / "open.json")
    (tmp_path / "file").write_text("kept")
    assert "not an empty folder" in failure_of(4, "convert", folder, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "rank file missing": "lacks model.0.pth",
        "ranks disagree": "do not agree about _mlp._mlp.0.bias",
        "dump missing": "lacks video_id_emb_values.rank_1.world_size_2",
        "world sizes differ": "different world sizes",
        "lengths disagree": "cut off, or of another width",
        "values cut off": "cut off",
        "keys cut off": "no whole number of int64 keys",
        "key twice": "stands twice, in video_id_emb_keys.rank_0.world_size_2 and video_id_emb_keys.rank_1",
        "unknown file": "notes.txt is no file of a DynamicEmb dump",
        "unknown table": "table hashtag is not part of the model",
        "nan": "layers.1.uvqk.bias is not finite",
        "nan in a dump": "embeddings.video_id.weight is not finite",
        "misshaped": "layers.1.output.weight is [5, 3], expected [64, 64]",
        "missing tensor": "layers.1.uvqk.bias is missing",
        "extra tensor": "_hstu_block.surprise is not known",
        "extra in a layer": "_attention_layers.1.surprise is not known",
        "layer missing": "layer 1 is missing",
        "sizes": "numbers, but",
        "no state": "holds no model_state_dict",
        "not tensors": "must hold a dictionary of tensors",
        "not named": "must hold a dictionary of tensors by name",
        "code": "holds code, which is never run",
    }.items(),
)
def test_damage_is_one_message(name: str, message: str, model: RankingModel, tmp_path: Path) -> None:
    folder = folder_of(model, tmp_path, world_size=2)
    damaged(name, folder)
    fields = tmp_path / "open.json"
    fields.write_text(json.dumps(OPEN))
    assert message in failure_of(4, "convert", folder, tmp_path / "out", "--config", fields)
    assert not (tmp_path / "out").exists()


def test_infer_takes_the_folder_and_tells_of_ids_beyond_its_tables(model: RankingModel, tmp_path: Path) -> None:
    prepare_synthetic(tmp_path / "data", SyntheticOptions(num_users=9, num_events=40, num_items=30))
    folder = folder_of(model, tmp_path)
    (tmp_path / "open.json").write_text(json.dumps(OPEN))
    arguments = ["--checkpoint", folder, "--config", tmp_path / "open.json", "--data-root", tmp_path / "data"]
    result = invoke("infer", *arguments, "--steps", "3", "--verify-cache", "1", "--format", "json")
    assert result.exit_code == 0, result.stderr
    users = PreparedDataset(tmp_path / "data", "synthetic").users(["register_days_range"])
    beyond = int((users >= SIZES["register_days_range"]).sum())
    assert beyond
    assert f"{beyond} users have a register_days_range that the checkpoint's table does not hold" in result.stderr
    assert "entries of the checkpoint are not needed" in result.stderr


def test_large_dumps_are_mapped_not_read(tmp_path: Path) -> None:
    """A table of two ranks: its rows lie in a file, in the order of the ranks."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((50_000, 8), dtype=np.float32)
    for rank in range(2):
        np.arange(rank, 100_000, 2).astype("<i8").tofile(tmp_path / f"t_emb_keys.rank_{rank}.world_size_2")
        (values + rank).astype("<f4").tofile(tmp_path / f"t_emb_values.rank_{rank}.world_size_2")
    tables, ignored = find_dumps(tmp_path)
    weight, keys = read_table(tables["t"], 8)
    assert ignored == 0
    assert torch.equal(keys, torch.cat([torch.arange(0, 100_000, 2), torch.arange(1, 100_000, 2)]))
    np.testing.assert_array_equal(weight.numpy(), np.concatenate([values, values + 1]))
    before = (tmp_path / "t_emb_values.rank_0.world_size_2").read_bytes()
    weight.add_(1.0)
    assert (tmp_path / "t_emb_values.rank_0.world_size_2").read_bytes() == before


def test_empty_dumps_are_a_clear_error(tmp_path: Path) -> None:
    for kind in ("keys", "values"):
        (tmp_path / f"t_emb_{kind}.rank_0.world_size_1").touch()
    weight, keys = read_table(find_dumps(tmp_path)[0]["t"], 8)
    assert weight.shape == (0, 8)
    assert len(keys) == 0
    with pytest.raises(InputError):
        load_checkpoint(tmp_path)
