"""Everything that flows and commands import, for forked processes; each of them imports its flow itself."""

import importlib
import pkgutil

import bytewax.recovery
import pyiceberg.catalog.sql

import k2flow.cli
import k2flow.flow.candles
import k2flow.flow.dataflow

for module in pkgutil.iter_modules(k2flow.cli.__path__, "k2flow.cli."):
    importlib.import_module(module.name)

__all__ = ["bytewax", "k2flow", "pyiceberg"]
