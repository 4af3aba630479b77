"""The KV cache: keys and values of users' histories across requests, paged and in two tiers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hstu_cli.kvcache.manager import KVCacheConfig, KVCacheManager

__all__ = ["KVCacheConfig", "KVCacheManager"]


def __getattr__(name: str) -> Any:
    """Load the manager when it is asked for: the books beside it need no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hstu_cli.kvcache import manager

    return getattr(manager, name)
