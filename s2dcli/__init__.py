"""Sparse-to-dense post-training of language models on verifiable problems."""

__version__ = "0.1.0"
