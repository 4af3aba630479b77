"""Native checkpoints: what is written, what comes back, and the files that are refused with a list of reasons."""

import dataclasses
import io
import json
import pickle
import random
import re
import resource
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.oracle import CONTEXTUAL_FEATURES, SMALL_CONFIG, random_state

from hstu_cli.errors import InputError, UsageError
from hstu_cli.model import ModelConfig, RankingModel, load_checkpoint, save_checkpoint
from hstu_cli.model.engine import InferenceEngine
from hstu_cli.model.ranking import random_model
from hstu_cli.model.tokens import UserRequest

VIDEO_IDS = [70, 3, -1, 41, 2**40, 5]
TABLES = dict.fromkeys(CONTEXTUAL_FEATURES, 5) | {"user_id": [17, 4], "video_id": VIDEO_IDS, "action_weights": 256}
CONFIG = ModelConfig.from_dict(SMALL_CONFIG)
D, INNER = 16, 16  # hidden_dim, num_heads * head_dim
NORMS = ("input_norm", "output_norm")

SHAPES = {
    "position.weight": [64, D],
    "embeddings.video_id.weight": [6, D],
    "embeddings.video_id.keys": [6],
    "embeddings.user_id.weight": [2, D],
    "embeddings.user_id.keys": [2],
    "embeddings.action_weights.weight": [256, D],
    **{f"embeddings.{name}.weight": [5, D] for name in CONTEXTUAL_FEATURES[1:]},
    **{f"layers.{i}.{norm}.{part}": [16] for i in (0, 1) for norm in NORMS for part in ("weight", "bias")},
    **{f"layers.{i}.uvqk.weight": [4 * INNER, D] for i in (0, 1)},
    **{f"layers.{i}.uvqk.bias": [4 * INNER] for i in (0, 1)},
    **{f"layers.{i}.output.weight": [D, INNER] for i in (0, 1)},
    "head.0.weight": [12, D],
    "head.0.bias": [12],
    "head.2.weight": [8, 12],
    "head.2.bias": [8],
}
"""Section 6 of the design for the small model: every name and its shape."""

State = dict[str, torch.Tensor]


def small_state(dtype: torch.dtype = torch.float32) -> State:
    state = {name: torch.from_numpy(array) for name, array in random_state(SMALL_CONFIG, TABLES, seed=1).items()}
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def write_state(state: State, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def load_state(state: State, folder: Path, dtype: torch.dtype | None = None) -> RankingModel:
    return load_checkpoint(write_state(state, folder / "state.safetensors"), config=CONFIG, dtype=dtype)


def write_folder(folder: Path, state: State | None = None, **changes: object) -> Path:
    """A native checkpoint folder; `changes` replace fields of its config.json, None removes them."""
    save_checkpoint(load_state(small_state(), folder.parent), folder)
    if state is not None:
        save_file(state, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text()) | changes
    fields = {name: value for name, value in fields.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def scores(model: RankingModel) -> np.ndarray:
    context, video_ids, actions = np.array([17, 1, 2, 3, 4, 0]), np.array([70, 3, 99, 5]), np.array([1, 64, 0, 255])
    return InferenceEngine(model).step([UserRequest(17, context, video_ids, actions, np.array([41, 2**40, 70]))]).logits


def assert_same_state(model: RankingModel, state: State) -> None:
    loaded = model.state_dict()
    assert set(loaded) == set(state)
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert torch.equal(loaded[name], tensor), name


def refusal(load: Callable[[], object]) -> str:
    """The message of an error that ends a command with exit code 4."""
    with pytest.raises(InputError) as raised:
        load()
    assert raised.value.exit_code == 4
    return str(raised.value)


def reasons(load: Callable[[], object]) -> set[str]:
    """The list of an error that ends a command with exit code 4."""
    headline, *lines = refusal(load).splitlines()
    assert headline.endswith("state.safetensors does not fit its configuration:")
    return {line.strip() for line in lines}


def test_a_folder_holds_the_names_and_fields_of_the_design(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "checkpoint"
    save_checkpoint(load_state(small_state(), tmp_path), folder)
    assert set(contents(folder)) == {"config.json", "model.safetensors"}
    saved = load_file(folder / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in saved.items()} == SHAPES
    assert saved["embeddings.video_id.keys"].tolist() == VIDEO_IDS
    rows = {name.split(".")[1]: shape[0] for name, shape in SHAPES.items() if re.match(r"embeddings\..*weight", name)}
    fields = json.loads((folder / "config.json").read_text())
    assert fields == {"format": "hstu-native", "format_version": 1, **SMALL_CONFIG, "tables": rows}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_folder_comes_back_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    model = load_state(small_state(dtype), tmp_path, dtype)
    save_checkpoint(model, tmp_path / "checkpoint")
    loaded = load_checkpoint(str(tmp_path / "checkpoint"), config=CONFIG, dtype=dtype)
    assert loaded.config == CONFIG
    assert not loaded.training
    assert_same_state(loaded, small_state(dtype))
    np.testing.assert_array_equal(scores(loaded), scores(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_weights_keep_the_dtype_of_their_file(suffix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = write_state(small_state(dtype), tmp_path / f"state{suffix}")
    assert_same_state(load_checkpoint(path, config=CONFIG), small_state(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_weights_take_the_dtype_that_is_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    assert_same_state(load_state(small_state(), tmp_path, dtype), small_state(dtype))


def test_weights_of_several_dtypes_take_the_widest(tmp_path: Path) -> None:
    state = small_state(torch.bfloat16)
    state["head.0.weight"] = small_state()["head.0.weight"]
    model = load_state(state, tmp_path)
    assert model.dtype == torch.float32
    assert torch.equal(model.state_dict()["head.0.weight"], small_state()["head.0.weight"])


@pytest.mark.parametrize("wrap", [torch.nn.Parameter, lambda tensor: tensor.t().contiguous().t()], ids=["grad", "view"])
def test_a_pickled_state_may_hold_parameters_and_views(wrap: Callable, tmp_path: Path) -> None:
    state = {
        name: wrap(tensor) if tensor.is_floating_point() and tensor.dim() == 2 else tensor
        for name, tensor in small_state().items()
    }
    model = load_checkpoint(write_state(state, tmp_path / "state.pt"), config=CONFIG)
    save_checkpoint(model, tmp_path / "checkpoint")
    assert_same_state(load_checkpoint(tmp_path / "checkpoint"), small_state())


def test_tables_that_share_their_keys_can_be_saved(tmp_path: Path) -> None:
    ids = torch.tensor([3, 9, 4])
    sizes = dict.fromkeys(CONTEXTUAL_FEATURES, 5)
    model = random_model(CONFIG, {"user_id": ids, "video_id": ids}, sizes, seed=0)
    save_checkpoint(model, tmp_path / "checkpoint")
    assert_same_state(load_checkpoint(tmp_path / "checkpoint"), model.state_dict())


def test_a_checkpoint_may_be_saved_over_the_one_it_came_from(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "checkpoint")
    model = load_checkpoint(folder)
    with torch.no_grad():
        model.position.weight.add_(1)
    save_checkpoint(model, folder)
    assert_same_state(load_checkpoint(folder), model.state_dict())
    assert set(contents(folder)) == {"config.json", "model.safetensors"}


def test_a_bare_state_dict_has_the_default_preset(tmp_path: Path) -> None:
    config = {**SMALL_CONFIG, "num_layers": 3, "hidden_dim": 512, "num_heads": 4, "head_dim": 128}
    config |= {"position_buckets": 8192, "head_dims": [512, 8]}
    state = {name: torch.from_numpy(array) for name, array in random_state(config, TABLES, seed=2).items()}
    model = load_checkpoint(write_state(state, tmp_path / "state.pt"), config=None)
    assert (model.config.max_history, model.config.scaling_seqlen) == (4096, 8398)
    assert_same_state(model, state)


def test_every_wrong_tensor_is_named_at_once(tmp_path: Path) -> None:
    state = small_state()
    del state["layers.1.uvqk.bias"], state["head.2.weight"]
    state["layers.2.output.weight"] = torch.zeros(D, INNER)
    state["embeddings.is_lord.weight"] = torch.zeros(3, D)
    state["layers.0.uvqk.weight"] = state["layers.0.uvqk.weight"].T.contiguous()[:, :63].contiguous()
    state["head.0.bias"][3] = torch.nan
    state["position.weight"][5, 5] = -torch.inf
    assert reasons(lambda: load_state(state, tmp_path)) == {
        "layers.1.uvqk.bias is missing",
        "head.2.weight is missing",
        "layers.2.output.weight is not part of the model",
        "embeddings.is_lord.weight is not part of the model",
        "layers.0.uvqk.weight is [16, 63], expected [64, 16]",
        "head.0.bias is not finite",
        "position.weight is not finite",
    }


USER, VIDEO = "embeddings.user_id", "embeddings.video_id"
TABLE_MISTAKES = {
    f"{VIDEO}.weight is missing": {f"{VIDEO}.weight": None, f"{VIDEO}.keys": None},
    f"{USER}.weight is [2, 17], expected [2, 16]": {f"{USER}.weight": torch.zeros(2, 17)},
    f"{USER}: keys must be unique, but 3 stands twice": {f"{USER}.keys": torch.tensor([3, 3])},
    f"{USER}: keys must be raw ids >= 0, or -1 for the default row, not -2": {f"{USER}.keys": torch.tensor([4, -2])},
    f"{VIDEO}: keys must be 6 int64, one for each row, not torch.int64 [5]": {f"{VIDEO}.keys": torch.arange(5)},
    f"{USER}: a table is [rows >= 1, dim] floating point, not torch.float32 [16]": {f"{USER}.weight": torch.zeros(D)},
}


@pytest.mark.parametrize("reason", TABLE_MISTAKES)
def test_a_wrong_table_is_named_beside_the_other_mistakes(reason: str, tmp_path: Path) -> None:
    state = small_state() | TABLE_MISTAKES[reason]
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    assert {reason} == reasons(lambda: load_state(state, tmp_path))
    del state["layers.1.uvqk.bias"]
    state["head.4.weight"] = torch.zeros(2)
    others = {"layers.1.uvqk.bias is missing", "head.4.weight is not part of the model"}
    assert {reason} | others == reasons(lambda: load_state(state, tmp_path))


@pytest.mark.parametrize("kind", ["integers", "complex numbers", "sparse", "beyond fp16"])
def test_another_kind_of_tensor_is_refused(kind: str, tmp_path: Path) -> None:
    x = torch.ones(64, D)
    wrong = {"integers": x.long(), "complex numbers": x.cfloat(), "sparse": x.to_sparse(), "beyond fp16": 1e5 * x}[kind]
    path = write_state(small_state() | {"position.weight": wrong}, tmp_path / "state.pt")
    assert "position.weight is" in refusal(lambda: load_checkpoint(path, config=CONFIG, dtype=torch.float16))


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ({"video_id": 7}, "embeddings.video_id.weight is [6, 16], expected [7, 16]"),
        ({"user_id": "2"}, "embeddings.user_id.weight is [2, 16]"),
        ({"user_id": None}, "user_id"),  # a table that config.json does not name
        ({"is_lord": 3}, "is_lord"),  # one that is not part of the model
    ],
    ids=repr,
)
def test_tables_must_have_the_rows_that_config_json_names(tables: dict, reason: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "checkpoint")
    named = json.loads((folder / "config.json").read_text())["tables"] | tables
    write_folder(folder, tables={name: rows for name, rows in named.items() if rows is not None})
    message = refusal(lambda: load_checkpoint(folder))
    assert reason in message
    assert "[None" not in message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "other"}, "format 'other', version 1; this program reads 'hstu-native', version 1"),
        ({"format_version": 2}, "format 'hstu-native', version 2"),
        ({"format": None}, "format None"),
        ({"tables": None}, "tables"),
        ({"tables": [1]}, "tables"),
        ({"num_heads": None}, "missing field num_heads"),
        ({"depth": 3}, "unknown field depth"),
        ({"max_history": 6}, "max_history must be a multiple of 4"),
        ({"contextual_mask": True}, "contextual_mask must be false"),
        ({"hidden_dim": 32}, "position.weight is [64, 16], expected [64, 32]"),
        ({"num_layers": 1}, "layers.1.uvqk.bias is not part of the model"),
    ],
    ids=repr,
)
def test_a_wrong_config_json_is_refused(changes: dict, reason: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "checkpoint", **changes)
    message = refusal(lambda: load_checkpoint(folder))
    assert message.startswith(str(folder))
    assert reason in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_needs_both_files(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "checkpoint")
    (folder / name).unlink()
    assert str(folder / name) in refusal(lambda: load_checkpoint(folder))


@pytest.mark.parametrize("name", ["nowhere", "nowhere.pt", "nowhere.safetensors"])
def test_a_missing_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    assert str(tmp_path / name) in refusal(lambda: load_checkpoint(tmp_path / name))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"max_history": 12}, "max_history 12, but the checkpoint was made with 8"),
        ({"norm_eps": 1e-6}, "norm_eps 1e-06"),
        ({"contextual_features": ()}, r"contextual_features \[\]"),
        ({"head_dims": (8,)}, r"head_dims \[8\], but the checkpoint was made with \[12, 8\]"),
    ],
    ids=repr,
)
def test_another_config_than_the_folders_is_a_usage_error(changes: dict, field: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "checkpoint")
    with pytest.raises(UsageError, match=field) as raised:
        load_checkpoint(folder, config=dataclasses.replace(CONFIG, **changes))
    assert raised.value.exit_code == 2


class Intruder:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("with_torch", [True, False], ids=["torch.save", "pickle.dump"])
def test_a_pickle_that_would_run_code_is_refused_unrun(with_torch: bool, suffix: str, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / f"state{suffix}"
    state = {**small_state(), "surprise": Intruder(trace)}
    if with_torch:
        torch.save(state, path)
        torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
    else:
        path.write_bytes(pickle.dumps(state))
        pickle.loads(path.read_bytes())
    assert trace.exists(), "the pickle is harmless and proves nothing"
    trace.unlink()
    assert str(path) in refusal(lambda: load_checkpoint(path, config=CONFIG))
    assert not trace.exists()


@pytest.mark.parametrize("value", [[torch.zeros(2)], torch.zeros(2), {"model": {}}, {"a": [0.0]}, 3], ids=repr)
def test_a_pickle_of_something_else_is_refused(value: object, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "state.pt")
    assert "state.pt must hold a dictionary of tensors" in refusal(lambda: load_checkpoint(tmp_path / "state.pt"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("content", [b"", b"just some text\n", b"\0" * 64], ids=["empty", "text", "zeros"])
def test_a_file_that_is_no_checkpoint_is_refused(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"state{suffix}"
    path.write_bytes(content)
    assert str(path) in refusal(lambda: load_checkpoint(path, config=CONFIG))


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_a_damaged_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"state.{'safetensors' if kind == 'safetensors' else 'pt'}"
    state = {"position.weight": torch.randn(3, 4), "keys": torch.arange(3), "head": torch.randn(2).bfloat16()}
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    whole, generator = path.read_bytes(), random.Random(0)
    for length in (len(whole) - 1, len(whole) // 2, 9, 1):
        path.write_bytes(whole[:length])
        assert str(path) in refusal(lambda: load_checkpoint(path, config=CONFIG))
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(generator.choice([1, 1, 4])):  # in front, where headers and pickles stand
            damaged[generator.randrange(min(len(damaged), 600))] = generator.randrange(256)
        path.write_bytes(damaged)
        with warnings.catch_warnings(action="ignore"):  # torch warns about odd pickles
            refusal(lambda: load_checkpoint(path, config=CONFIG))  # it is no whole model even where it can be read


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_a_place_that_cannot_be_a_folder_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    folder = tmp_path / "taken" if place == "a file" else tmp_path / "taken" / "checkpoint"
    model = load_state(small_state(), tmp_path)
    assert str(folder) in refusal(lambda: save_checkpoint(model, folder))
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_save_without_room_leaves_the_old_checkpoint_whole(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "checkpoint")
    before = contents(folder)
    model = load_state(small_state(torch.float64), tmp_path, torch.float64)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))  # a larger file fails as on a full disk
    try:
        assert str(folder) in refusal(lambda: save_checkpoint(model, folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(folder) == before
    assert_same_state(load_checkpoint(folder), small_state())
