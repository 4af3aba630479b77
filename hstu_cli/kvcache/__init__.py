"""The KV cache: keys and values of users' histories across requests, paged and in two tiers."""

from hstu_cli.kvcache.manager import KVCacheConfig, KVCacheManager

__all__ = ["KVCacheConfig", "KVCacheManager"]
