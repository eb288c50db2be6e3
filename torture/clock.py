"""Gives a process a clock that is wrong."""

import atexit
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

COMPILER = shutil.which("gcc")
"""Compiles the library; None if it is not installed."""
_SOURCE = Path(__file__).with_suffix(".c")


@cache
def library() -> Path:
    """Compile the library that shifts a process's clock, and return its path. It is removed at the end."""
    assert COMPILER is not None
    folder = Path(tempfile.mkdtemp(prefix="k2flow-clock-"))
    atexit.register(shutil.rmtree, folder)
    path = folder / "clock.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O2", "-o", path, _SOURCE, "-ldl"], check=True, timeout=60)
    folder.chmod(0o755)  # other users' processes load it too
    return path


def shifted(seconds: float) -> dict[str, str]:
    """Return the environment of a process whose clock is `seconds` ahead; negative: behind."""
    return {"LD_PRELOAD": str(library()), "CLOCK_SHIFT": f"{seconds:.0f}"}
