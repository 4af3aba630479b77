"""Model configurations: the presets, the history window's rule, refused values, and what `--config` may name."""

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.oracle import CONTEXTUAL_FEATURES, SMALL_CONFIG

from hstu_cli.config import MODEL_PRESETS, ModelConfig, resolve_model_config
from hstu_cli.errors import InputError, UsageError

COMMON = {"norm_eps": 1e-5, "next_item_temperature": 0.05, "contextual_mask": False}
PRESETS = {
    "kuairand_gr": COMMON
    | {
        "num_layers": 3,
        "hidden_dim": 512,
        "num_heads": 4,
        "head_dim": 128,
        "max_history": 4096,
        "max_candidates": 100,
        "position_buckets": 8192,
        "scaling_seqlen": 8398,
        "head_dims": [512, 8],
        "contextual_features": CONTEXTUAL_FEATURES,
    },
    "tiny": COMMON
    | {
        "num_layers": 2,
        "hidden_dim": 64,
        "num_heads": 2,
        "head_dim": 32,
        "max_history": 64,
        "max_candidates": 32,
        "position_buckets": 1024,
        "scaling_seqlen": 198,
        "head_dims": [64, 8],
        "contextual_features": CONTEXTUAL_FEATURES,
    },
    "benchmark": COMMON
    | {
        "num_layers": 8,
        "hidden_dim": 1024,
        "num_heads": 4,
        "head_dim": 256,
        "max_history": 2048,
        "max_candidates": 256,
        "position_buckets": 8192,
        "scaling_seqlen": 4352,
        "head_dims": [512, 8],
        "contextual_features": [],
    },
}


def small_model(**changes: object) -> ModelConfig:
    return ModelConfig.from_dict({**SMALL_CONFIG, **changes})


def test_presets_are_those_of_the_design() -> None:
    assert {name: preset.to_dict() for name, preset in MODEL_PRESETS.items()} == PRESETS


@pytest.mark.parametrize("name", ["kuairand_gr", "tiny"])
def test_the_divisor_covers_history_candidates_and_context(name: str) -> None:
    preset = MODEL_PRESETS[name]
    assert preset.scaling_seqlen == (preset.max_history + preset.max_candidates) * 2 + len(preset.contextual_features)


def test_derived_sizes() -> None:
    config = small_model(head_dim=4, contextual_features=["user_id"])
    assert config.num_context_tokens == 1
    assert config.attention_dim == 8
    assert config.alpha == 0.5
    assert config.max_history_tokens == 1 + 2 * 8


@given(quarter=st.integers(1, 2000), num_events=st.integers(0, 50_000))
def test_the_window_starts_where_the_rule_says(quarter: int, num_events: int) -> None:
    window = 4 * quarter
    config = small_model(max_history=window)
    start = config.window_start(num_events)
    assert start == (0 if num_events <= window else math.ceil((num_events - window) / quarter) * quarter)
    kept = num_events - start
    assert kept == num_events if num_events <= window else 3 * window / 4 < kept <= window
    assert start <= config.window_start(num_events + 1) <= start + quarter  # it never moves back, nor by two steps
    others = small_model(max_history=window, max_candidates=77, position_buckets=3, contextual_features=[])
    assert others.window_start(num_events) == start


def test_the_window_of_eight_event_by_event() -> None:
    starts = [small_model().window_start(num_events) for num_events in range(15)]
    assert starts == [0] * 9 + [2, 2, 4, 4, 6, 6]


POSITIVE_INTEGERS = (
    "num_layers",
    "hidden_dim",
    "num_heads",
    "head_dim",
    "max_history",
    "max_candidates",
    "position_buckets",
    "scaling_seqlen",
)
REFUSED = [
    *((name, value) for name in POSITIVE_INTEGERS for value in (0, -4, 4.0, "4", None, True, [4])),
    *(("max_history", value) for value in (1, 2, 4095)),
    *(("head_dims", value) for value in (8, "8", None, [], [8, 16], [7], [0, 8], [1.5, 8], [True, 8], ["8"])),
    *(("contextual_features", value) for value in ("user_id", None, ["is_lord"], ["user_id", 3], ["user_id"] * 2)),
    *(("norm_eps", value) for value in (0, -1e-5, math.nan, math.inf, "1e-5", None, True)),
    *(("next_item_temperature", value) for value in (0, -0.05, math.nan, math.inf, "1", None, True)),
    *(("contextual_mask", value) for value in (True, 0, None, "false")),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=repr)
def test_a_refused_value_is_named_with_its_field(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name) as raised:
        small_model(**{name: value})
    culprit = value
    if isinstance(value, list) and value and name in ("head_dims", "contextual_features"):
        culprit = value[-1] if name == "contextual_features" else value[0]
    assert repr(culprit) in str(raised.value)


def test_fields_are_checked_and_frozen() -> None:
    config = small_model()
    assert config.head_dims == (12, 8)
    assert config.contextual_features == tuple(CONTEXTUAL_FEATURES)
    with pytest.raises(AttributeError):
        config.num_layers = 3
    assert config == small_model()
    assert hash(config) == hash(small_model())


def test_unknown_fields_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown field depth, width; known are num_layers, hidden_dim"):
        small_model(width=3, depth=4)


def test_missing_fields_are_refused_by_name() -> None:
    fields = {name: value for name, value in SMALL_CONFIG.items() if name not in ("num_heads", "head_dims")}
    with pytest.raises(ValueError, match=r"missing field num_heads, head_dims$"):
        ModelConfig.from_dict(fields)


def test_fields_with_a_default_may_be_left_out() -> None:
    optional = {*COMMON, "contextual_features"}
    config = ModelConfig.from_dict({name: value for name, value in SMALL_CONFIG.items() if name not in optional})
    assert config == small_model(**COMMON)


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_survives_json(name: str) -> None:
    config = MODEL_PRESETS[name]
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        *((name, name) for name in PRESETS),
        ("KuaiRand-GR", "kuairand_gr"),
        ("kuairand-gr", "kuairand_gr"),
        ("TINY", "tiny"),
    ],
)
def test_config_names_a_preset(name: str, preset: str) -> None:
    assert resolve_model_config(name) is MODEL_PRESETS[preset]


@pytest.mark.parametrize("file_name", ["config.json", "my.conf"])
def test_config_names_a_file(file_name: str, tmp_path: Path) -> None:
    path = tmp_path / file_name
    path.write_text(json.dumps(SMALL_CONFIG))
    assert resolve_model_config(str(path)) == small_model()


def test_config_takes_the_file_of_a_native_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({"format": "hstu-native", "format_version": 1, "tables": {"video_id": 3}, **SMALL_CONFIG})
    )
    assert resolve_model_config(str(path)) == small_model()


@pytest.mark.parametrize("name", ["large", "tin", "", "{" + '"num_layers": 2, ' * 40 + "}"], ids=lambda name: name[:6])
def test_a_name_that_is_nothing_is_a_usage_error_with_the_choices(name: str) -> None:
    with pytest.raises(UsageError, match=f"--config {re.escape(name)}.*kuairand_gr, tiny, benchmark") as raised:
        resolve_model_config(name)
    assert raised.value.exit_code == 2


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(str(tmp_path))):
        resolve_model_config(str(tmp_path))


def small_json(**changes: object) -> bytes:
    return json.dumps({**SMALL_CONFIG, **changes}).encode()


BAD_FILES = {
    "not JSON": (b"{'num_layers': 2}", "is not a JSON file"),
    "not UTF-8": (b"\xff\xfe{", "is not a JSON file"),
    "empty": (b"", "is not a JSON file"),
    "a list": (b"[1, 2]", "must hold a JSON object, not a list"),
    "null": (b"null", "must hold a JSON object, not a NoneType"),
    "a missing field": (b"{}", "missing field num_layers"),
    "an unknown field": (small_json(depth=4), "unknown field depth"),
    "a wrong value": (small_json(num_heads=0), "num_heads must be .* not 0"),
    "NaN": (small_json(norm_eps=math.nan), "norm_eps must be .* not nan"),
    "a contextual mask": (
        small_json(contextual_mask=True),
        "contextual_mask must be false",
    ),
}


@pytest.mark.parametrize("mistake", BAD_FILES)
def test_a_wrong_file_is_an_input_error_that_names_it(mistake: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[mistake]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}.*{message}") as raised:
        resolve_model_config(str(path))
    assert raised.value.exit_code == 4


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.json cannot be read: No such file") as raised:
        resolve_model_config(str(tmp_path / "nowhere.json"))
    assert raised.value.exit_code == 4
