"""The checks of third-party versions: each fires, and the pinned versions pass."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from k2flow.compat import librdkafka, require_version
from k2flow.errors import UnsupportedVersionError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("found", "supported"),
    [
        ("1.1.9", False),
        ("1.2.0", True),
        ("1.2.0rc1", True),
        ("1.9.10.post1", True),
        ("1.10", True),
        ("2.0.0", False),
        ("2.0.0.dev1", False),
        ("10.0.0", False),
    ],
)
def test_range_of_versions(found: str, supported: bool) -> None:
    if supported:
        require_version("library", found, (1, 2, 0), (2, 0, 0))
        return
    with pytest.raises(UnsupportedVersionError, match=rf"^library {found} is .* 1\.2\.0 up to, .* 2\.0\.0: "):
        require_version("library", found, (1, 2, 0), (2, 0, 0))


@pytest.mark.parametrize(
    ("module", "library", "version_of", "wrong"),
    [
        ("bytewax", "bytewax", "importlib.metadata.version", "0.22.0"),
        ("pyiceberg", "pyiceberg", "pyiceberg.__version__", "0.13.0"),
        ("pyarrow", "pyarrow", "pyarrow.__version__", "27.0.0"),
        ("schema_registry", "confluent-kafka", "importlib.metadata.version", "2.17.0"),
    ],
)
def test_import_refuses_another_version(
    monkeypatch: pytest.MonkeyPatch, module: str, library: str, version_of: str, wrong: str
) -> None:
    monkeypatch.setattr(version_of, wrong if version_of.endswith("__") else lambda name: wrong)
    monkeypatch.delitem(sys.modules, f"k2flow.compat.{module}", raising=False)
    with pytest.raises(UnsupportedVersionError, match=f"^{library} {wrong} is installed"):
        importlib.import_module(f"k2flow.compat.{module}")


def test_import_refuses_another_librdkafka(monkeypatch: pytest.MonkeyPatch) -> None:
    import confluent_kafka

    found = confluent_kafka.libversion()[0]
    assert librdkafka.library_version() == found
    with pytest.raises(UnsupportedVersionError, match=r"^librdkafka 2\.17\.0 is installed"):
        librdkafka.check_library("2.17.0")


def layout(offsets: list[int]) -> np.dtype[np.void]:
    formats = [np.int32, np.int32, *[np.int64] * 5]
    return np.dtype({"names": librdkafka.MESSAGE.names, "formats": formats, "offsets": offsets, "itemsize": 72})


def test_layout_of_messages() -> None:
    librdkafka.check_message_layout(layout([0, 16, 24, 32, 40, 48, 56]))


@pytest.mark.parametrize(
    "offsets", [[4, 16, 24, 32, 40, 48, 56], [0, 16, 32, 24, 40, 48, 56], [0, 8, 16, 32, 40, 48, 56]]
)
def test_another_layout_of_messages_is_refused(offsets: list[int]) -> None:
    with pytest.raises(UnsupportedVersionError, match="lays out its messages in another way"):
        librdkafka.check_message_layout(layout(offsets))


def test_32_bits_are_refused() -> None:
    with pytest.raises(UnsupportedVersionError, match="64-bit machines only"):
        librdkafka.check_message_layout(pointer_bytes=4)


@pytest.mark.parametrize("library", ["bytewax", "pyiceberg", "pyarrow", "librdkafka", "confluent-kafka"])
def test_checked_ranges_are_those_of_pyproject(library: str) -> None:
    """Pip must not install a version that the check refuses, and constraints.txt pins one that it accepts."""
    package = {"librdkafka": "confluent-kafka"}.get(library, library)
    source = next(
        path for path in (ROOT / "k2flow/compat").rglob("*.py") if f'require_version("{library}"' in path.read_text()
    )
    oldest, before = (
        tuple(map(int, each.split(", ")))
        for each in re.findall(r"\((\d+, \d+, \d+)\)", source.read_text().split(f'require_version("{library}"')[1])[:2]
    )
    (declared,) = re.findall(rf'"{package}(?:\[.*?\])?([=<>][^"]*)"', (ROOT / "pyproject.toml").read_text())
    (pinned,) = re.findall(rf"^{package}==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    require_version(package, pinned, oldest, before)
    if declared.startswith("=="):
        assert declared == f"=={'.'.join(map(str, oldest))}"
        assert before == (*oldest[:2], oldest[2] + 1)
    else:
        low, high = re.fullmatch(r">=([\d.]+),<([\d.]+)", declared).groups()  # type: ignore[union-attr]
        assert oldest == padded(low)
        assert before == padded(high)


def padded(version: str) -> tuple[int, ...]:
    numbers = [int(part) for part in version.split(".")]
    return tuple(numbers + [0] * (3 - len(numbers)))


def test_pickling_a_batch_reuses_freed_memory() -> None:
    code = """
import os, pickle, resource
from k2flow.compat.pyarrow import keep_freed_memory

class Sent:
    data = os.urandom(7_000_000)

    def __reduce__(self):
        return bytes, (self.data,)

keep_freed_memory()
for i in range(23):
    if i == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pickle.loads(pickle.dumps(Sent()))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(printed) < 1_000  # 34,000 by glibc's own thresholds
