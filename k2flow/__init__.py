"""k2flow: crypto trades from Kafka into Apache Iceberg, exactly once.

The public names load on first use, so that `import k2flow` imports neither Arrow, Iceberg, DuckDB nor Bytewax.
"""

# ruff: noqa: F403, F405

import importlib
import os
from typing import TYPE_CHECKING, Any

from k2flow.errors import *

if TYPE_CHECKING:
    from k2flow.exchange import Exchange, Rule
    from k2flow.flow import build
    from k2flow.query.connection import connect

__all__ = [
    "AlreadyRunningError", "AuditError", "CacheError", "CatalogError", "CatalogRefusedError", "CatalogSettingsError",
    "CommitConflictError", "CommitError", "DataFileError", "DedupError", "Exchange", "FencedError", "FlowFailedError",
    "HeadMovedError", "K2flowError", "KafkaError", "KafkaRefusedError", "LogReplacedError", "LostOffsetsError",
    "LostTableError", "MaintenanceError", "MissingExtraError", "NoBrokerError", "NoTopicError", "OffsetGapError",
    "ProduceError", "QueryError", "RegistryError", "ReportError", "ReprocessError", "Rule", "RunError", "SchemaError",
    "SettingsError", "TableDiffersError", "UnknownExchangeError", "UnsupportedVersionError", "build", "connect",
]  # fmt: skip

_MODULES = {  # of the names that load on first use
    "Exchange": "k2flow.exchange",
    "Rule": "k2flow.exchange",
    "build": "k2flow.flow",
    "connect": "k2flow.query.connection",
}

__version__ = "0.1.0"

# Arrow reads this when it is imported: see k2flow.compat.pyarrow.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from k2flow.config.pyiceberg_file import check_pyiceberg_file

    check_pyiceberg_file()
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
