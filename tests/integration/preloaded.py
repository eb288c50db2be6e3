"""What flows and commands import, for processes that are forked with it; flows themselves are imported anew by each."""

import bytewax.recovery
import pyiceberg.catalog.sql

import k2flow.cli.main
import k2flow.flow.dataflow

__all__ = ["bytewax", "k2flow", "pyiceberg"]
