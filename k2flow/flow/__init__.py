"""The Bytewax dataflow of an exchange: source, deduplication step, sink, and how a process runs them."""

from k2flow.flow.dataflow import build

__all__ = ["build"]
