"""The public names of k2flow, and how light its import is."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import k2flow
from k2flow import errors

HEAVY = ("bytewax", "duckdb", "numpy", "pyarrow", "pyiceberg")


def error_classes() -> set[str]:
    return {name for name, found in vars(errors).items() if inspect.isclass(found) and issubclass(found, Exception)}


def heavy_imports(statement: str = "") -> str:
    """Return the heavy libraries that a new Python has imported after `import k2flow` and `statement`."""
    code = f"import sys, k2flow{statement}; print(*sorted(set(sys.modules) & set({HEAVY})))"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


def test_public_names() -> None:
    assert set(k2flow.__all__) == {"connect", "Exchange", "Rule", "build"} | error_classes()
    assert len(set(k2flow.__all__)) == len(k2flow.__all__)
    assert set(k2flow.__all__) <= set(dir(k2flow))


@pytest.mark.parametrize("name", k2flow.__all__)
def test_public_name_exists_and_is_documented(name: str) -> None:
    assert getattr(k2flow, name).__doc__


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'k2flow' has no attribute 'no_such_name'"):
        _ = k2flow.no_such_name


def test_import_loads_no_heavy_library() -> None:
    assert heavy_imports() == ""
    assert heavy_imports("; k2flow.KafkaError") == ""
    assert heavy_imports("; k2flow.connect") != ""  # the check itself works


def test_unreadable_catalog_file_is_an_error_of_k2flow(tmp_path: Path) -> None:
    (tmp_path / ".pyiceberg.yaml").write_text("catalog:\n  k2flow: [\n")
    code = "import k2flow\ntry: k2flow.connect\nexcept k2flow.SettingsError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("PyIceberg's .pyiceberg.yaml cannot be read: "), done.stderr
