"""Settings in files: a folder with one file per variable, as Docker and Kubernetes mount secrets.

A file counts as if its variable was in the environment. But no process list shows its value, and no child process
inherits it. pydantic-settings' own `secrets_dir` is not enough: PyIceberg and librdkafka's properties need the files
too, and it ignores unknown files and variables that are set twice.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from k2flow.errors import SettingsError

VARIABLE = "K2FLOW_SECRETS_DIR"
NAME = re.compile(r"(K2FLOW|PYICEBERG|AWS|PG)[A-Z0-9_]+")
"""Variables that k2flow reads, and the libraries that connect it to catalogs and storage."""
_from_files: dict[str, str] = {}


def load_into_environment() -> None:
    """Put the values of the files into this process's environment, where all settings are read.

    Repeated calls read the files again. A variable that is in the environment too raises SettingsError.
    """
    folder = os.environ.get(VARIABLE)
    if folder is None:
        return
    for name, value in read_files(Path(folder)).items():
        if os.environ.get(name) not in (None, _from_files.get(name)):
            raise SettingsError(f"{name} is set twice, in the environment and in {VARIABLE}={folder}: keep one of them")
        os.environ[name] = _from_files[name] = value


def is_from_file(name: str) -> bool:
    """Return whether the value of a variable came from a file."""
    return name in _from_files


def inheritable_environment() -> dict[str, str]:
    """Return the environment for child processes, without the values from files: they read the files themselves."""
    return {name: value for name, value in os.environ.items() if not is_from_file(name)}


def read_files(folder: Path) -> Mapping[str, str]:
    """Return the contents of the files in `folder`, by name, without one line end at the end of each.

    Names that begin with a dot are skipped: Kubernetes keeps versions of a mounted folder under such names. A file that
    is unreadable or no setting raises SettingsError.
    """
    values: dict[str, str] = {}
    try:
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if not NAME.fullmatch(path.name) or path.name == VARIABLE:
                raise SettingsError(f"{path} is no setting: name files in {VARIABLE} as variables, such as K2FLOW_HOME")
            values[path.name] = path.read_text(encoding="utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not UTF-8 text: write the value as UTF-8") from None
    except OSError as error:
        raise SettingsError(f"{VARIABLE}={folder} cannot be read: {error.strerror}: {error.filename}") from error
    if nul := next((name for name, value in values.items() if "\0" in value), None):
        raise SettingsError(f"{folder / nul} has a zero byte, which no setting may have: remove it")
    return values
