"""Lookups: TorchRec's and the built-in one give the same bits and share the weights; what is absent is named."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cli import failure_of, invoke, record_of
from torch import nn

from hstu_cli.backend import Backend
from hstu_cli.config import MODEL_PRESETS
from hstu_cli.data.synthetic import SyntheticOptions, prepare_synthetic
from hstu_cli.errors import UnavailableError
from hstu_cli.kvcache import KVCacheConfig, KVCacheManager
from hstu_cli.model.dynamicemb_dump import find_dumps, read_table, write_table
from hstu_cli.model.embedding import EmbeddingTable
from hstu_cli.model.engine import InferenceEngine
from hstu_cli.model.identity import WeightsIdentity
from hstu_cli.model.lookups import choose_embedding, make_lookup, why_unavailable
from hstu_cli.model.ranking import RankingModel, random_model
from hstu_cli.model.tokens import UserRequest

TINY = MODEL_PRESETS["tiny"]
SMALL = ["bench-e2e", "--config", "tiny", "--history-step", "10", "--num-batches", "4", "--candidates", "9"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def torchrec() -> None:
    """TorchRec, or a reason to skip that names what is missing."""
    reason = why_unavailable("torchrec", "cpu")
    if reason is not None:
        pytest.skip(f"TorchRec: {reason}")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    prepare_synthetic(root, SyntheticOptions(num_users=10, num_events=200, num_items=300, shape="1k"))
    return root


def small_model(dtype: torch.dtype = torch.float32) -> RankingModel:
    """Tables of every kind: keys and a default row, keys alone, no keys."""
    ids = {"video_id": torch.tensor([7, -1, 2**62, 3, 11]), "user_id": torch.tensor([5, 9])}
    sizes = dict.fromkeys(TINY.contextual_features[1:], 4)
    return random_model(TINY, ids, sizes, seed=3).to(dtype)


def some_ids(model: RankingModel) -> dict[str, torch.Tensor]:
    """Known and unknown ids of every table, and none of one of them."""
    ids = {name: torch.tensor([0, 3, 3]) for name in model.embeddings}
    return ids | {
        "video_id": torch.tensor([7, 8, -1, 2**62]),
        "user_id": torch.tensor([6, 5, -4]),
        "register_days_range": torch.tensor([], dtype=torch.int64),
    }


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, embeddings in expected.items():
        assert found[name].dtype == embeddings.dtype
        assert torch.equal(found[name], embeddings), name


ROWS_WITH_KEYS = st.lists(st.integers(-1, 20) | st.integers(0, 2**63 - 1), min_size=1, max_size=8, unique=True)


@st.composite
def tables_and_ids(draw: st.DrawFn) -> tuple[nn.ModuleDict, dict[str, torch.Tensor]]:
    """Up to four tables with or without keys and default rows, and ids for each, maybe none."""
    width, dtype = draw(st.integers(1, 6)), draw(st.sampled_from(DTYPES))
    tables, ids = nn.ModuleDict(), {}
    for index in range(draw(st.integers(1, 4))):
        keys = draw(st.none() | ROWS_WITH_KEYS)
        num_rows = draw(st.integers(1, 8)) if keys is None else len(keys)
        known = st.sampled_from(keys or range(num_rows))
        anything = known if keys is None else known | st.integers(-3, 25) | st.integers(-(2**63), 2**63 - 1)
        weight = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(index)).to(dtype)
        name = f"table_{index}"
        tables[name] = EmbeddingTable(weight, None if keys is None else torch.tensor(keys))
        ids[name] = torch.tensor(draw(st.lists(anything, max_size=12)), dtype=torch.int64)
    return tables, ids


@pytest.mark.usefixtures("torchrec")
@settings(deadline=None)
@given(case=tables_and_ids())
def test_torchrec_gives_the_bits_of_the_tables(case: tuple[nn.ModuleDict, dict[str, torch.Tensor]]) -> None:
    from hstu_cli.model.lookups.torchrec import TorchRecLookup

    tables, ids = case
    assert_same_bits(TorchRecLookup(tables)(ids), {name: table(ids[name]) for name, table in tables.items()})


@pytest.mark.usefixtures("torchrec")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cached", [False, True], ids=["uncached", "cached"])
def test_scores_are_the_same_bits(dtype: torch.dtype, cached: bool) -> None:
    """Users whose histories grow, with videos that the model does not know and one request in chunks."""
    model = small_model(dtype)
    rng = np.random.default_rng(0)
    videos, actions = rng.choice([7, 8, 2**62, 3, 11], 40), rng.integers(0, 256, 40)
    batches = [
        [
            UserRequest(user, np.array([5 + user, 1, 2, 3, 0, 1]), videos[:n], actions[:n], videos[:candidates])
            for user, candidates in ((0, 3), (1, 40), (2, 0))
        ]
        for n in (0, 4, 11)
    ]
    engines = []
    for name in ("torch", "torchrec"):
        cache = KVCacheManager(KVCacheConfig(64, 8), TINY, dtype, Backend()) if cached else None
        engines.append(InferenceEngine(model, "blocked", cache, make_lookup(name, model)))
    for batch in batches:
        expected, found = (engine.step(batch) for engine in engines)
        assert np.array_equal(found.logits, expected.logits)
        assert torch.equal(found.last_hidden, expected.last_hidden)


@pytest.mark.usefixtures("torchrec")
def test_weights_are_shared_and_changes_seen() -> None:
    model = small_model()
    lookup, ids = make_lookup("torchrec", model), some_ids(model)
    for name, table in model.embeddings.items():
        assert lookup.collection.embeddings[name].weight is table.weight
    with torch.no_grad():
        model.embeddings["video_id"].weight[0] = 17.0
    assert lookup(ids)["video_id"][0].eq(17.0).all()
    assert_same_bits(lookup(ids), model.look_up(ids))
    state = {name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)  # replaces the parameters
    assert lookup(ids)["video_id"][0].eq(34.0).all()
    model.to(torch.bfloat16)
    assert_same_bits(lookup(ids), model.look_up(ids))
    pointers = {module.weight.data_ptr() for module in lookup.collection.embeddings.values()}
    assert pointers == {table.weight.data_ptr() for table in model.embeddings.values()}


@pytest.mark.usefixtures("torchrec")
def test_gradients_reach_the_tables() -> None:
    model = small_model()
    ids = some_ids(model)
    torch.stack([found.sum() for found in make_lookup("torchrec", model)(ids).values()]).sum().backward()
    gradients = {name: table.weight.grad.clone() for name, table in model.embeddings.items()}
    model.zero_grad()
    torch.stack([found.sum() for found in model.look_up(ids).values()]).sum().backward()
    assert_same_bits(gradients, {name: table.weight.grad for name, table in model.embeddings.items()})


@pytest.mark.usefixtures("torchrec")
def test_a_model_does_not_know_its_lookup() -> None:
    model = small_model()
    names, identity = list(model.state_dict()), WeightsIdentity(model)
    before = identity.current()
    lookup = make_lookup("torchrec", model)
    engine = InferenceEngine(model, lookup=lookup)
    engine.step([UserRequest(0, np.array([5, 1, 2, 3, 0, 1]), np.array([7]), np.array([1]), np.array([3]))])
    assert list(model.state_dict()) == names
    assert identity.current() == before
    copied = copy.deepcopy(model).to(torch.float64)
    assert copied.look_up(some_ids(model))["user_id"].dtype == torch.float64
    assert lookup(some_ids(model))["user_id"].dtype == torch.float32


@pytest.mark.usefixtures("torchrec")
def test_torchrec_refuses_what_it_would_round() -> None:
    with pytest.raises(ValueError, match=r"float32 at most.*torch\.float64"):
        make_lookup("torchrec", small_model(torch.float64))


@pytest.mark.usefixtures("torchrec")
@pytest.mark.parametrize("cache", ["--kv-cache", "--no-kv-cache"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_infer_writes_the_same_predictions(root: Path, tmp_path: Path, cache: str, dtype: str) -> None:
    found = {}
    for name in ("torch", "torchrec"):
        path = tmp_path / f"{name}.parquet"
        arguments = ["--data-root", root, "--embedding", name, cache, "--dtype", dtype, "--predictions-out", path]
        record = record_of("infer", "--config", "tiny", *arguments)
        assert record["embedding"] == {"name": name, "reason": "as requested"}
        found[name] = pq.read_table(path)
    assert found["torch"].num_rows > 100
    assert found["torchrec"].equals(found["torch"])


@pytest.mark.usefixtures("torchrec")
def test_infer_verifies_its_cache_against_the_tables(root: Path) -> None:
    arguments = ["--data-root", root, "--embedding", "torchrec", "--verify-cache", 10, "--steps", 20]
    assert record_of("infer", "--config", "tiny", *arguments)["kv_cache"]["verified"]["num_requests"] > 0


def test_auto_is_torch_and_says_why(root: Path) -> None:
    arguments = ["infer", "--config", "tiny", "--data-root", root, "--steps", 1]
    record = record_of(*arguments)
    assert record["embedding"] == {"name": "torch", "reason": "auto: built in, and right on every device"}
    assert "torch (auto: built in" in invoke(*arguments).stdout


@pytest.mark.usefixtures("torchrec")
def test_bench_e2e_compares_each_embedding_with_its_own_baseline(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    arguments = ["--embedding", "torchrec,auto,torch", "--num-users", "1,2", "--num-iters", "3"]
    record = record_of(*SMALL, *arguments, "--plot", tmp_path / "plot.html")
    rows = [row for row in record["rows"] if "skipped" not in row]
    assert [choice["name"] for choice in record["embeddings"]] == ["torchrec", "torch"]
    assert [(row["num_users"], row["embedding"], row["variant"]) for row in rows] == [
        (users, embedding, variant)
        for users in (1, 2) for embedding in ("torchrec", "torch") for variant in ("baseline", "kvcache")
    ]  # fmt: skip
    for baseline, cached in zip(rows[::2], rows[1::2], strict=True):
        totals = [np.array(row["total_latency_ms"]["samples"]) for row in (baseline, cached)]
        assert baseline["speedup_vs_baseline"] == 1
        assert cached["speedup_vs_baseline"] == pytest.approx(np.median(totals[0] / totals[1]))
        assert cached["max_abs_logit_difference"] < 1e-5
    assert "kvcache, torchrec" in (tmp_path / "plot.html").read_text()
    table = invoke(*SMALL, "--embedding", "torch,torchrec", "--num-users", "1", "--num-iters", "1").stdout
    assert re.search(r"1 │ torchrec +│ kvcache", table)


@pytest.mark.usefixtures("torchrec")
def test_a_wrong_lookup_invalidates_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    from hstu_cli.model.lookups.torchrec import TorchRecLookup

    right = TorchRecLookup.__call__
    wrong = lambda *a: {name: found.flip(-1) for name, found in right(*a).items()}  # noqa: E731
    monkeypatch.setattr(TorchRecLookup, "__call__", wrong)
    result = invoke(*SMALL, "--embedding", "torch,torchrec", "--num-users", "1", "--num-iters", "1")
    assert result.exit_code == 1
    assert "1 users, torchrec, baseline, uncached: output error" in " ".join(result.stderr.split())


def test_dry_runs_list_every_embedding() -> None:
    rows = record_of("bench-e2e", "--dry-run", "--embedding", "auto", "--num-users", "1")["rows"]
    assert [row["embedding"] for row in rows] == ["torch"] * 3


@pytest.mark.parametrize("command", ["infer", "bench-e2e"])
def test_unknown_and_absent_embeddings(command: str) -> None:
    message = failure_of(2, command, "--config", "tiny", "--embedding", "hash")
    assert "'hash'; choose from auto, torch, torchrec, dynamicemb" in message
    message = failure_of(3, command, "--config", "tiny", "--device", "cpu", "--embedding", "dynamicemb")
    assert "NVIDIA GPUs alone, and this device is cpu" in message
    assert "https://github.com/NVIDIA/recsys-examples" in message


def test_absent_dynamicemb_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dynamicemb", None)
    with pytest.raises(UnavailableError, match=r"cannot be loaded.*build it from corelib/dynamicemb") as caught:
        choose_embedding("dynamicemb", "cuda")
    assert caught.value.exit_code == 3


BROKEN = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == '{package}':
            raise {error}(name + ' is broken')
sys.meta_path.insert(0, Broken())
from hstu_cli.cli import app
sys.argv = ['hstu', 'infer', '--config', 'tiny', '--steps', '1', '--embedding', '{embedding}', '--format', 'json']
app()
"""


@pytest.mark.parametrize(
    ("package", "error"),
    [("torchrec", "ImportError"), ("torchrec", "OSError"), ("torchrec", "RuntimeError"), ("fbgemm_gpu", "OSError")],
)
def test_torchrec_that_does_not_load_exits_3_with_the_way_to_get_it(package: str, error: str, tmp_path: Path) -> None:
    """A shared library made for another torch is an OSError, its operators that are missing a RuntimeError."""
    if package == "fbgemm_gpu" and why_unavailable("torchrec", "cpu") is not None:
        pytest.skip("TorchRec is not installed")
    environment = {**os.environ, "HSTU_HOME": str(tmp_path)}

    def run(embedding: str) -> subprocess.CompletedProcess[str]:
        code = BROKEN.format(package=package, error=error, embedding=embedding)
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
        )

    done = run("torchrec")
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert f"cannot be loaded ({error}: {package} is broken)" in done.stderr
    assert "pip install --no-deps torchrec==" in done.stderr
    assert not list(tmp_path.iterdir())  # before any data is made
    if error == "RuntimeError":
        assert run("auto").returncode == 0


def test_what_the_makefile_installs_is_what_the_message_says(monkeypatch: pytest.MonkeyPatch) -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    monkeypatch.setitem(sys.modules, "torchrec.modules.embedding_modules", None)
    message = why_unavailable("torchrec", "cpu")
    for variable in ("TORCHREC", "TORCHREC_DEPS"):
        assert re.search(rf"^{variable} +:= (.+)$", makefile, re.MULTILINE)[1] in message


def test_env_says_which_embeddings_work() -> None:
    embeddings = record_of("env")["embeddings"]
    assert list(embeddings) == ["torch", "torchrec", "dynamicemb"]
    assert embeddings["torch"] == {"available": True, "reason": None}
    assert embeddings["torchrec"]["available"] == (why_unavailable("torchrec", "cpu") is None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_handed_to_dynamicemb_reads_back(dtype: torch.dtype, tmp_path: Path) -> None:
    keys, values = torch.tensor([2**62, 0, 9]), torch.randn(3, 5).to(dtype)
    write_table(tmp_path, "video_id", keys, values)
    tables, num_ignored = find_dumps(tmp_path)
    found, found_keys = read_table(tables["video_id"], 5)
    assert num_ignored == 2  # the scores and the options, of use to DynamicEmb alone
    assert torch.equal(found_keys, keys)
    assert torch.equal(found.to(dtype), values)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torchrec", "dynamicemb"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    reason = why_unavailable(name, "cuda")
    if reason is not None:
        pytest.skip(reason)
    model = small_model(dtype).to("cuda:0")
    lookup, ids = make_lookup(name, model), {n: i.to("cuda:0") for n, i in some_ids(model).items()}
    assert_same_bits(lookup(ids), model.look_up(ids))
    with torch.no_grad():
        model.embeddings["video_id"].weight.neg_()
    assert_same_bits(lookup(ids), model.look_up(ids))
