"""Each error of Kafka, the catalogs and the storage is on one side of one table: retried, or fatal."""

import errno
import inspect
from types import ModuleType

import pyiceberg.exceptions
import pytest
import requests.exceptions
import sqlalchemy.exc
from confluent_kafka import KafkaError

from k2flow import retryable
from k2flow.errors import CatalogError, CatalogSettingsError, KafkaRefusedError, LostOffsetsError
from k2flow.errors import KafkaError as OwnKafkaError
from k2flow.iceberg.catalog import catalog_errors
from k2flow.kafka.consumer import PartitionEvent, check_event
from k2flow.process_exit import EXIT_FAILED, EXIT_TRY_AGAIN, EXIT_UNAVAILABLE, exit_code
from k2flow.retryable import Verdict, kafka_verdict, verdict
from k2flow.supervisor.failure import find_failure

MODULES = [pyiceberg.exceptions, sqlalchemy.exc, requests.exceptions]
FATAL_KAFKA = {Verdict.FATAL, Verdict.LOST, Verdict.DAMAGED}


def codes() -> dict[str, int]:
    """Return all error codes of the installed librdkafka, by name."""
    members = inspect.getmembers(KafkaError, lambda value: isinstance(value, int))
    return {name: code for name, code in members if name.isupper()}


def errors_of(module: ModuleType) -> list[type[Exception]]:
    """Return the exceptions that a library declares in a module, without its warnings."""
    classes = [each for _, each in inspect.getmembers(module, inspect.isclass) if each.__module__ == module.__name__]
    return [each for each in classes if issubclass(each, Exception) and not issubclass(each, Warning)]


def test_every_code_of_librdkafka_is_in_the_table() -> None:
    assert len(codes()) > 150
    assert codes().keys() == retryable.KAFKA.keys()
    texts = (retryable._KAFKA_RETRIED, retryable._KAFKA_FATAL, retryable._KAFKA_LOST, retryable._KAFKA_DAMAGED)
    names = [name for text in texts for name in text.split()]
    assert len(names) == len(set(names)), "a code has two verdicts"
    assert {kafka_verdict(code) for code in codes().values()} == set(Verdict)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_error_of_the_libraries_is_in_the_table(module: ModuleType) -> None:
    found = errors_of(module)
    assert len(found) > 15
    for each in found:
        names = {f"{base.__module__}.{base.__qualname__}" for base in each.__mro__}
        assert names & retryable.ERRORS.keys(), each


def test_the_table_names_no_error_that_does_not_exist() -> None:
    known = {f"{each.__module__}.{each.__qualname__}" for module in MODULES for each in errors_of(module)}
    assert retryable.ERRORS.keys() - known == {"builtins.OSError"}


@pytest.mark.parametrize(
    "name",
    [
        "TOPIC_AUTHORIZATION_FAILED", "GROUP_AUTHORIZATION_FAILED", "SASL_AUTHENTICATION_FAILED", "_AUTHENTICATION",
        "_SSL", "DELEGATION_TOKEN_EXPIRED", "THROTTLING_QUOTA_EXCEEDED", "LEADER_NOT_AVAILABLE", "KAFKA_STORAGE_ERROR",
        "UNKNOWN_TOPIC_OR_PART", "_UNKNOWN_PARTITION", "_ALL_BROKERS_DOWN", "UNKNOWN", "_FATAL",
    ],
)  # fmt: skip
def test_what_can_pass_is_retried(name: str) -> None:
    """In a running flow it is a warning, or ends the process with an error after which it is started again."""
    event = PartitionEvent(code=codes()[name], text="no", partition=0, offset=5)
    try:
        check_event(event, "trades", 5)
    except KafkaRefusedError as error:
        assert error.retryable  # noqa: PT017 - either is right


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (KafkaError.OFFSET_OUT_OF_RANGE, LostOffsetsError),
        (KafkaError._LOG_TRUNCATION, LostOffsetsError),
        (KafkaError.UNSUPPORTED_VERSION, OwnKafkaError),
        (KafkaError.TOPIC_EXCEPTION, OwnKafkaError),
    ],
)
def test_what_cannot_pass_ends_the_flow(code: int, kind: type[OwnKafkaError]) -> None:
    event = PartitionEvent(code=code, text="no", partition=1, offset=5)
    with pytest.raises(kind, match=r"trades\[1\].*offset 5") as caught:
        check_event(event, "trades", 5)
    assert not caught.value.retryable


def test_a_code_of_a_later_librdkafka_is_retried() -> None:
    assert kafka_verdict(9_999) is Verdict.RETRIED


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(number, "no") for number in (errno.ENOSPC, errno.EROFS, errno.EMFILE, errno.EACCES, errno.EIO)),
        OSError("AWS Error ACCESS_DENIED during PutObject operation"),
        OSError("AWS Error SLOW_DOWN during PutObject operation"),
        OSError("AWS Error NO_SUCH_BUCKET during PutObject operation"),
        pyiceberg.exceptions.ForbiddenError("403"),
        pyiceberg.exceptions.UnauthorizedError("401"),
        pyiceberg.exceptions.ServiceUnavailableError("503"),
        pyiceberg.exceptions.OAuthError("token"),
        requests.exceptions.ConnectionError("refused"),
        sqlalchemy.exc.OperationalError("SELECT 1", {}, Exception("down")),
        sqlalchemy.exc.ProgrammingError("SELECT 1", {}, Exception("permission denied for table iceberg_tables")),
    ],
    ids=str,
)
def test_outages_and_refusals_of_catalog_and_storage_are_retried(error: Exception) -> None:
    assert verdict(error) is Verdict.RETRIED
    with pytest.raises(CatalogError) as caught, catalog_errors():
        raise error
    assert caught.value.retryable


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENAMETOOLONG, "File name too long"),
        requests.exceptions.InvalidURL("Failed to parse"),
        sqlalchemy.exc.ArgumentError("Could not parse SQLAlchemy URL"),
    ],
    ids=str,
)
def test_wrong_addresses_of_catalog_and_storage_are_fatal(error: Exception) -> None:
    assert verdict(error) is Verdict.FATAL
    with pytest.raises(CatalogSettingsError), catalog_errors():
        raise error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), EXIT_TRY_AGAIN),
        (OSError("AWS Error ACCESS_DENIED during HeadObject operation"), EXIT_TRY_AGAIN),
        (OSError("AWS Error SLOW_DOWN during PutObject operation"), EXIT_TRY_AGAIN),
        (pyiceberg.exceptions.ForbiddenError("403"), EXIT_TRY_AGAIN),
        (pyiceberg.exceptions.ServiceUnavailableError("503"), EXIT_TRY_AGAIN),
        (sqlalchemy.exc.ProgrammingError("SELECT 1", {}, Exception("permission denied")), EXIT_TRY_AGAIN),
        (OSError("AWS Error NETWORK_CONNECTION during HeadObject operation"), EXIT_UNAVAILABLE),
        (requests.exceptions.ConnectionError("refused"), EXIT_UNAVAILABLE),
        (sqlalchemy.exc.OperationalError("SELECT 1", {}, Exception("unable to open database file")), EXIT_UNAVAILABLE),
        (requests.exceptions.InvalidURL("Failed to parse"), EXIT_FAILED),
    ],
    ids=str,
)
def test_a_refusal_is_retried_at_the_first_start_too(error: Exception, code: int) -> None:
    """A catalog that gives no answer then may have a wrong address."""
    with pytest.raises(CatalogError) as caught, catalog_errors():
        raise error
    assert exit_code(caught.value, reading=False) == code
    failure = find_failure("binance", [code], [str(caught.value)], was_up=False)
    assert failure is not None
    assert failure.retryable is (code == EXIT_TRY_AGAIN)


def test_an_error_of_another_library_is_fatal() -> None:
    assert verdict(ZeroDivisionError()) is Verdict.FATAL
