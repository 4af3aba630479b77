"""How embeddings are looked up: by the model's own tables, by TorchRec or by DynamicEmb; all give the same result."""

import importlib
from dataclasses import dataclass

from hstu_cli.errors import UnavailableError, UsageError
from hstu_cli.model.embedding import Lookup
from hstu_cli.model.ranking import RankingModel

AUTO = "auto"
EMBEDDINGS = ("torch", "torchrec", "dynamicemb")
"""All ways of looking up that there are."""

_ENTRY = {"torchrec": "torchrec.modules.embedding_modules", "dynamicemb": "dynamicemb.batched_dynamicemb_tables"}
"""What must import for a lookup to work."""

_HOW_TO_GET = {
    "torchrec": (
        "On a CPU, with torch 2.13: pip install 'torch==2.13.*' fbgemm-gpu-cpu==1.8.0 tensordict tqdm pyre-extensions; "
        "then: pip install --no-deps torchrec==1.8.0. "
        "With an NVIDIA GPU: pip install 'torch==2.13.*' fbgemm-gpu==1.8.0 torchrec==1.8.0."
    ),
    "dynamicemb": (
        "It is on no package index: build it from corelib/dynamicemb of https://github.com/NVIDIA/recsys-examples, "
        "as the README there says."
    ),
}


@dataclass(frozen=True, slots=True)
class EmbeddingChoice:
    """A resolved way of looking up: its name and the reason, as table and JSON show them."""

    name: str
    reason: str


def choose_embedding(requested: str, device_type: str) -> EmbeddingChoice:
    """Resolve `--embedding` for a device type; an explicit name is kept or refused, never replaced.

    Raises UsageError naming the choices, UnavailableError naming what is missing and how to get it.
    """
    if requested == AUTO:
        return EmbeddingChoice("torch", "auto: built in, and right on every device")
    if requested not in EMBEDDINGS:
        raise UsageError(f"There is no --embedding {requested!r}; choose from {AUTO}, {', '.join(EMBEDDINGS)}.")
    reason = why_unavailable(requested, device_type)
    if reason is not None:
        raise UnavailableError(f"--embedding {requested}: {reason}")
    return EmbeddingChoice(requested, "as requested")


def why_unavailable(name: str, device_type: str) -> str | None:
    """Why one of `EMBEDDINGS` cannot work here and how to get it, or None; imports its package, which takes seconds."""
    if name not in _ENTRY:
        return None
    if name == "dynamicemb" and device_type != "cuda":
        return f"DynamicEmb runs on NVIDIA GPUs alone, and this device is {device_type}. {_HOW_TO_GET[name]}"
    try:
        importlib.import_module(_ENTRY[name])
    # A compiled part made for another torch fails as any of these, where it is loaded or where its operators are used.
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        detail = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return f"the package cannot be loaded ({detail}). {_HOW_TO_GET[name]}"
    return None


def make_lookup(name: str, model: RankingModel) -> Lookup:
    """The lookup called `name` over the model's tables, for an engine; `choose_embedding` has found its package.

    The model itself knows nothing of it: its `state_dict`, copies and conversions are as without.
    """
    if name == "torchrec":
        from hstu_cli.model.lookups.torchrec import TorchRecLookup

        return TorchRecLookup(model.embeddings)
    if name == "dynamicemb":
        from hstu_cli.model.lookups.dynamicemb import DynamicEmbLookup

        return DynamicEmbLookup(model.embeddings)
    return model.look_up
