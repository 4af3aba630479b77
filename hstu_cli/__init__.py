"""HSTU ranking models: data preparation, cached inference and benchmarks on any backend."""

__version__ = "0.1.0"
