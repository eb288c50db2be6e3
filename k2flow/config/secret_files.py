"""Settings as files: a folder of them, each named as a variable, as Docker and Kubernetes mount secrets.

What a file holds is as if it stood in the environment, but no list of processes shows it, and no process that is
started inherits it.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from k2flow.errors import SettingsError

FOLDER = "K2FLOW_SECRETS_DIR"
NAME = re.compile(r"(K2FLOW|PYICEBERG|AWS|PG)[A-Z0-9_]+")
"""What k2flow and the libraries that it reaches catalogs and storage with read from the environment."""

_adopted: dict[str, str] = {}


def adopt() -> None:
    """Puts the folder's files into this process's environment, where all settings are read from; once.

    Raises SettingsError for a folder or file that cannot be read, or means nothing, or is set in the environment too.
    """
    folder = os.environ.get(FOLDER)
    if folder is None:
        return
    for name, value in read(Path(folder)).items():
        if os.environ.get(name) not in (None, _adopted.get(name)):
            raise SettingsError(f"{name} is set twice, in the environment and in {FOLDER}={folder}: keep one of them")
        os.environ[name] = _adopted[name] = value


def adopted(name: str) -> bool:
    """Whether the variable came from a file."""
    return name in _adopted


def inheritable_environment() -> dict[str, str]:
    """The environment for processes that are started: they read the files themselves."""
    return {name: value for name, value in os.environ.items() if not adopted(name)}


def read(folder: Path) -> Mapping[str, str]:
    """What the files of `folder` hold, by name; one line end at the end of each is left out. Raises SettingsError.

    Names that begin with a dot are passed over: Kubernetes keeps its versions of a mounted folder under such ones.
    """
    found: dict[str, str] = {}
    try:
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if not NAME.fullmatch(path.name) or path.name == FOLDER:
                raise SettingsError(f"{path} is no setting: files in {FOLDER} are named as variables, K2FLOW_... or so")
            found[path.name] = path.read_text(encoding="utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not text in UTF-8") from None
    except OSError as error:
        raise SettingsError(f"{FOLDER}={folder} cannot be read: {error.strerror}: {error.filename}") from error
    if nul := next((name for name, value in found.items() if "\0" in value), None):
        raise SettingsError(f"{folder / nul} holds a zero byte, which no setting may")
    return found
