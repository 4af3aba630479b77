"""The operators: one folder each, with a public function and its implementations."""

from hstu_cli.kernels.attention import hstu_attention

__all__ = ["hstu_attention"]
