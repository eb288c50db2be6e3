"""PyIceberg's configuration file, `.pyiceberg.yaml`: an unreadable one is an error of one line.

PyIceberg reads the file when it is imported. Without this check an unreadable one ends in a traceback at that import.
"""

import os
from pathlib import Path

from k2flow.errors import SettingsError

NAME = ".pyiceberg.yaml"


def check_pyiceberg_file() -> None:
    """Read the file as PyIceberg does, if it exists, before anything imports PyIceberg. Raises SettingsError."""
    folders = [os.environ.get("PYICEBERG_HOME") or None, Path("~").expanduser(), Path.cwd()]
    if not any(Path(folder, NAME).is_file() for folder in folders if folder is not None):
        return
    import strictyaml
    from pyiceberg.utils.config import Config

    try:
        Config()
    except (strictyaml.YAMLError, UnicodeDecodeError, OSError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"PyIceberg's {NAME} cannot be read: {reason}") from error
