"""All errors that k2flow raises on purpose.

    K2flowError
    ├── KafkaError: NoBrokerError, NoTopicError, KafkaRefusedError, LostOffsetsError (LogReplacedError)
    ├── CommitError: FencedError, OffsetGapError, CommitConflictError, HeadMovedError
    └── all others

Each message is one line: the cause, then what to do next.
"""

from typing import ClassVar, TypeVar

E = TypeVar("E", bound=Exception)


class K2flowError(Exception):
    """The root of all errors that k2flow raises on purpose."""

    retryable: ClassVar[bool] = False
    """Whether the cause may disappear by itself: if so, the supervisor starts the flow again."""


def one_line(error: Exception) -> str:
    """Return an error on one line: the text of an own error, else its type and text."""
    text = " ".join(str(error).split())
    return text if isinstance(error, K2flowError) else f"{type(error).__name__}: {text}"


def without_traceback(error: E) -> E:
    """Return an error that is kept as a value, without its traceback and causes.

    Their frames would keep all values of all callers in memory: a batch for each error. Raise a copy of it, not itself.
    """
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


class SettingsError(K2flowError):
    """A setting is unknown, missing or wrong; the message names it."""


class UnknownExchangeError(K2flowError):
    """No file in flows/ declares this exchange."""


class UnsupportedVersionError(K2flowError):
    """A library's version is not one that k2flow was tested with; the message names both."""


class MissingExtraError(K2flowError):
    """An optional part of k2flow is not installed; the message has the command that installs it."""


class CatalogError(K2flowError):
    """The Iceberg catalog or its storage cannot be reached or used."""

    retryable = True


class CatalogRefusedError(CatalogError):
    """The catalog or its storage answers, and refuses: rights, space or a quota are missing, or it is overloaded."""


class CatalogSettingsError(CatalogError):
    """The Iceberg catalog cannot be used as it is configured."""

    retryable = False


class TableDiffersError(K2flowError):
    """A table exists but differs from its definition; the message shows how."""


class LostTableError(K2flowError):
    """The catalog does not have a table that the storage has; the message names its newest metadata file."""


class DataFileError(K2flowError):
    """A data file is damaged, or its columns do not fit the table's."""


class KafkaError(K2flowError):
    """The broker, a topic or a partition cannot be used."""


class NoBrokerError(KafkaError):
    """No broker answers at all; one may later."""


class NoTopicError(KafkaError):
    """The topic does not exist."""


class KafkaRefusedError(KafkaError):
    """Kafka refuses, or cannot do now, what it may do later: rights, credentials or a topic are missing."""

    retryable = True


class LostOffsetsError(KafkaError):
    """Kafka no longer has messages that were never committed; the message names the exact offsets."""


class LogReplacedError(LostOffsetsError):
    """Kafka's log is not the one that was read; the message names the offset and both messages."""


class ProduceError(K2flowError):
    """Messages could not be produced or delivered."""


class SchemaError(K2flowError):
    """An Avro writer schema cannot be used."""


class RegistryError(K2flowError):
    """The schema registry cannot be reached: an outage, never a reason to reject a message."""

    retryable = True


class CommitError(K2flowError):
    """A commit to a table failed permanently."""

    retryable = True


class FencedError(CommitError):
    """A newer copy of the flow has fenced this one, which must stop."""

    retryable = False


class OffsetGapError(CommitError):
    """A range of offsets does not begin where the table's ledger ends."""


class HeadMovedError(CommitError):
    """A table's main branch was moved: it does not hold the rows of its ledger. The message names both offsets."""

    retryable = False


class CommitConflictError(CommitError):
    """Other commits have changed the table so that this one no longer fits; maintenance then yields to them."""


class AlreadyRunningError(K2flowError):
    """Another live copy of the flow owns the tables."""


class DedupError(K2flowError):
    """Ids cannot be deduplicated as given: a bug in the caller, never in the data."""


class CacheError(K2flowError):
    """The cache of the deduplication window cannot be used: the window is read from Gold.

    A flow ends with it only if another program changes a file of the cache in place, while the flow uses it.
    """

    retryable = True


class RunError(K2flowError):
    """The processes of a flow could not be run."""

    retryable = True


class FlowFailedError(RunError):
    """A flow failed, and starting it again cannot help: an operator must fix the cause."""

    retryable = False


class ReprocessError(K2flowError):
    """Messages cannot be reprocessed as asked; no row was changed."""


class MaintenanceError(K2flowError):
    """A table cannot be maintained as it is."""


class QueryError(K2flowError):
    """A query failed."""


class ReportError(K2flowError):
    """A report cannot be written."""


class AuditError(K2flowError):
    """The audit is incomplete: it could not read something, and proves nothing about the invariants."""
