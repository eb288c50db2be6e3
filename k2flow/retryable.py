"""Which errors of Kafka, the catalog and the storage are retried, and which end a flow: the one table of them.

A cause that can pass is retried, with back-off and a warning, however long: an outage, a refusal (rights, credentials,
tokens, certificates, quotas), a full disk. A cause that no change around the flow can remove is fatal: a wrong property
or address, a request that the server does not know. So are messages that Kafka no longer has, and a damaged log:
reading on would skip messages, so an operator decides. `docs/operations.md`, "What is retried", says it for users.
"""

import errno
from collections.abc import Mapping
from enum import StrEnum
from functools import cache


class Verdict(StrEnum):
    """What follows from an error. All but RETRIED end a flow."""

    RETRIED = "retried"
    FATAL = "fatal"
    LOST = "lost"  # fatal: Kafka does not have the next messages
    DAMAGED = "damaged"  # fatal: a batch of the log cannot be read


_KAFKA_LOST = "OFFSET_OUT_OF_RANGE _AUTO_OFFSET_RESET _LOG_TRUNCATION"
_KAFKA_DAMAGED = """
_BAD_MSG _BAD_COMPRESSION _NOT_IMPLEMENTED _UNDERFLOW INVALID_MSG INVALID_MSG_SIZE INVALID_RECORD
UNSUPPORTED_COMPRESSION_TYPE MSG_SIZE_TOO_LARGE
"""
_KAFKA_RETRIED = """
NO_ERROR UNKNOWN
_TRANSPORT _RESOLVE _ALL_BROKERS_DOWN _TIMED_OUT _TIMED_OUT_QUEUE _MSG_TIMED_OUT _UNKNOWN_BROKER _DESTROY_BROKER
_NODE_UPDATE _WAIT_CACHE _WAIT_COORD _INTR _RETRY _PARTIAL _IN_PROGRESS _PREV_IN_PROGRESS _STATE _OUTDATED _NOOP
_PARTITION_EOF _NO_OFFSET _QUEUE_FULL _ISR_INSUFF _PURGE_QUEUE _PURGE_INFLIGHT
_SSL _AUTHENTICATION _FATAL _FAIL _CRIT_SYS_RESOURCE _FS _DESTROY
_UNKNOWN_PARTITION _UNKNOWN_TOPIC _UNKNOWN_GROUP _MAX_POLL_EXCEEDED _ASSIGNMENT_LOST _ASSIGN_PARTITIONS
_REVOKE_PARTITIONS _FENCED
UNKNOWN_TOPIC_OR_PART UNKNOWN_TOPIC_ID INCONSISTENT_TOPIC_ID LEADER_NOT_AVAILABLE NOT_LEADER_FOR_PARTITION
BROKER_NOT_AVAILABLE REPLICA_NOT_AVAILABLE OFFSET_NOT_AVAILABLE KAFKA_STORAGE_ERROR LOG_DIR_NOT_FOUND
REQUEST_TIMED_OUT NETWORK_EXCEPTION FENCED_LEADER_EPOCH UNKNOWN_LEADER_EPOCH STALE_CTRL_EPOCH STALE_BROKER_EPOCH
NOT_CONTROLLER UNKNOWN_CONTROLLER_ID LISTENER_NOT_FOUND PREFERRED_LEADER_NOT_AVAILABLE ELIGIBLE_LEADERS_NOT_AVAILABLE
ELECTION_NOT_NEEDED REASSIGNMENT_IN_PROGRESS NO_REASSIGNMENT_IN_PROGRESS REBOOTSTRAP_REQUIRED
FETCH_SESSION_ID_NOT_FOUND INVALID_FETCH_SESSION_EPOCH THROTTLING_QUOTA_EXCEEDED UNSTABLE_OFFSET_COMMIT
TOPIC_AUTHORIZATION_FAILED GROUP_AUTHORIZATION_FAILED CLUSTER_AUTHORIZATION_FAILED
TRANSACTIONAL_ID_AUTHORIZATION_FAILED DELEGATION_TOKEN_AUTHORIZATION_FAILED DELEGATION_TOKEN_EXPIRED
DELEGATION_TOKEN_NOT_FOUND DELEGATION_TOKEN_OWNER_MISMATCH DELEGATION_TOKEN_AUTH_DISABLED
DELEGATION_TOKEN_REQUEST_NOT_ALLOWED SASL_AUTHENTICATION_FAILED UNSUPPORTED_SASL_MECHANISM ILLEGAL_SASL_STATE
SECURITY_DISABLED PRINCIPAL_DESERIALIZATION_FAILURE
COORDINATOR_LOAD_IN_PROGRESS COORDINATOR_NOT_AVAILABLE NOT_COORDINATOR REBALANCE_IN_PROGRESS ILLEGAL_GENERATION
UNKNOWN_MEMBER_ID MEMBER_ID_REQUIRED FENCED_MEMBER_EPOCH STALE_MEMBER_EPOCH UNRELEASED_INSTANCE_ID FENCED_INSTANCE_ID
GROUP_ID_NOT_FOUND GROUP_MAX_SIZE_REACHED NON_EMPTY_GROUP GROUP_SUBSCRIBED_TO_TOPIC
NOT_ENOUGH_REPLICAS NOT_ENOUGH_REPLICAS_AFTER_APPEND TOPIC_ALREADY_EXISTS TOPIC_DELETION_DISABLED POLICY_VIOLATION
OPERATION_NOT_ATTEMPTED RESOURCE_NOT_FOUND DUPLICATE_RESOURCE
CONCURRENT_TRANSACTIONS TRANSACTION_COORDINATOR_FENCED TRANSACTION_ABORTABLE UNKNOWN_PRODUCER_ID
SHARE_SESSION_NOT_FOUND INVALID_SHARE_SESSION_EPOCH SHARE_SESSION_LIMIT_REACHED FENCED_STATE_EPOCH
UNKNOWN_SUBSCRIPTION_ID TELEMETRY_TOO_LARGE
"""
_KAFKA_FATAL = """
_INVALID_ARG _CONFLICT _EXISTING_SUBSCRIPTION _UNKNOWN_PROTOCOL _UNSUPPORTED_FEATURE _READ_ONLY _NOENT _INVALID_TYPE
_NOT_CONFIGURED _APPLICATION _INCONSISTENT _GAPLESS_GUARANTEE _INVALID_DIFFERENT_RECORD
_KEY_SERIALIZATION _VALUE_SERIALIZATION _KEY_DESERIALIZATION _VALUE_DESERIALIZATION
TOPIC_EXCEPTION UNSUPPORTED_VERSION UNSUPPORTED_FOR_MESSAGE_FORMAT INVALID_REQUEST INVALID_CONFIG INVALID_GROUP_ID
INVALID_SESSION_TIMEOUT INCONSISTENT_GROUP_PROTOCOL UNSUPPORTED_ASSIGNOR INVALID_REGULAR_EXPRESSION
INVALID_COMMIT_OFFSET_SIZE OFFSET_METADATA_TOO_LARGE INVALID_PRINCIPAL_TYPE UNACCEPTABLE_CREDENTIAL
INVALID_PARTITIONS INVALID_REPLICATION_FACTOR INVALID_REPLICA_ASSIGNMENT INVALID_TIMESTAMP RECORD_LIST_TOO_LARGE
INVALID_REQUIRED_ACKS OUT_OF_ORDER_SEQUENCE_NUMBER DUPLICATE_SEQUENCE_NUMBER INVALID_PRODUCER_EPOCH INVALID_TXN_STATE
INVALID_PRODUCER_ID_MAPPING INVALID_TRANSACTION_TIMEOUT PRODUCER_FENCED INVALID_RECORD_STATE
INCONSISTENT_VOTER_SET INVALID_UPDATE_VERSION FEATURE_UPDATE_FAILED MISMATCHED_ENDPOINT_TYPE UNSUPPORTED_ENDPOINT_TYPE
INVALID_REGISTRATION INVALID_VOTER_KEY DUPLICATE_VOTER VOTER_NOT_FOUND STREAMS_INVALID_TOPOLOGY
STREAMS_INVALID_TOPOLOGY_EPOCH STREAMS_TOPOLOGY_FENCED
"""


def _by_name(**names: str) -> dict[str, Verdict]:
    return {name: Verdict(verdict) for verdict, text in names.items() for name in text.split()}


KAFKA: Mapping[str, Verdict] = _by_name(
    retried=_KAFKA_RETRIED, fatal=_KAFKA_FATAL, lost=_KAFKA_LOST, damaged=_KAFKA_DAMAGED
)
"""By the names of librdkafka's error codes, those of confluent_kafka.KafkaError."""

ERRORS: Mapping[str, Verdict] = _by_name(
    retried="""
    pyiceberg.exceptions.RESTError pyiceberg.exceptions.BadRequestError pyiceberg.exceptions.UnauthorizedError
    pyiceberg.exceptions.ForbiddenError pyiceberg.exceptions.AuthorizationExpiredError pyiceberg.exceptions.OAuthError
    pyiceberg.exceptions.ServerError pyiceberg.exceptions.ServiceUnavailableError pyiceberg.exceptions.SignError
    pyiceberg.exceptions.CommitFailedException pyiceberg.exceptions.CommitStateUnknownException
    pyiceberg.exceptions.WaitingForLockException pyiceberg.exceptions.NoSuchNamespaceError
    pyiceberg.exceptions.NoSuchTableError pyiceberg.exceptions.NamespaceAlreadyExistsError
    pyiceberg.exceptions.TableAlreadyExistsError pyiceberg.exceptions.NamespaceNotEmptyError
    pyiceberg.exceptions.NoSuchPlanTaskError
    sqlalchemy.exc.SQLAlchemyError
    builtins.OSError
    """,
    fatal="""
    pyiceberg.exceptions.NotInstalledError pyiceberg.exceptions.ValidationError
    pyiceberg.exceptions.NoSuchPropertyException pyiceberg.exceptions.NoSuchIcebergTableError
    pyiceberg.exceptions.NoSuchViewError pyiceberg.exceptions.NoSuchIdentifierError
    pyiceberg.exceptions.ConditionalCheckFailedException pyiceberg.exceptions.DynamoDbError
    pyiceberg.exceptions.GenericDynamoDbError pyiceberg.exceptions.ResolveError
    pyiceberg.exceptions.ValidationException pyiceberg.exceptions.ViewAlreadyExistsError
    sqlalchemy.exc.ArgumentError sqlalchemy.exc.CompileError sqlalchemy.exc.NoSuchModuleError
    sqlalchemy.exc.UnboundExecutionError sqlalchemy.exc.NotSupportedError sqlalchemy.exc.DataError
    sqlalchemy.exc.EmulatedDBAPIException
    requests.exceptions.URLRequired requests.exceptions.MissingSchema requests.exceptions.InvalidSchema
    requests.exceptions.InvalidURL requests.exceptions.InvalidHeader requests.exceptions.UnrewindableBodyError
    """,
)
"""By the names of exception classes. A class that is not named has the verdict of its nearest base class."""

ERRNO_FATAL = frozenset(
    (errno.ENAMETOOLONG, errno.EINVAL, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENOEXEC, errno.E2BIG)
)
"""Numbers of OSErrors that no change around the flow removes. All others are retried: ENOSPC, EROFS, EMFILE, ..."""


ANSWERED = {
    "pyiceberg.exceptions.RESTError",
    "sqlalchemy.exc.ProgrammingError",
    "sqlalchemy.exc.IntegrityError",
    "sqlalchemy.exc.InternalError",
}
"""Classes of errors that a server gave as its answer, so that its address is right."""
ERRNO_ANSWERED = frozenset(
    (
        errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
        errno.EIO, errno.EBUSY, errno.EAGAIN, errno.ESTALE,
    )
)  # fmt: skip
S3_ANSWER, S3_SILENT = "AWS Error ", "AWS Error NETWORK_CONNECTION"
"""In PyArrow's errors of an object store, which have no number: it has answered, or it cannot be reached."""


def kafka_verdict(code: int) -> Verdict:
    """Return what follows from librdkafka's error `code`. One that this version does not know is retried."""
    return _kafka_by_code().get(code, Verdict.RETRIED)


def verdict(error: BaseException) -> Verdict:
    """Return what follows from an error of the catalog or the storage; FATAL for one that the table does not know."""
    if isinstance(error, OSError) and error.errno in ERRNO_FATAL:
        return Verdict.FATAL
    names = (f"{each.__module__}.{each.__qualname__}" for each in type(error).__mro__)
    return next((ERRORS[name] for name in names if name in ERRORS), Verdict.FATAL)


def answered(error: BaseException) -> bool:
    """Whether the catalog or storage itself has refused, so that its address is right and the cause can pass."""
    text = str(error)
    if isinstance(error, OSError) and (error.errno in ERRNO_ANSWERED or (S3_ANSWER in text and S3_SILENT not in text)):
        return True
    return any(f"{each.__module__}.{each.__qualname__}" in ANSWERED for each in type(error).__mro__)


@cache
def _kafka_by_code() -> Mapping[int, Verdict]:
    from confluent_kafka import KafkaError  # only commands that use Kafka load it

    return {getattr(KafkaError, name): each for name, each in KAFKA.items() if hasattr(KafkaError, name)}
