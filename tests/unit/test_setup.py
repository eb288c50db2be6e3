"""scripts/setup on a machine whose only Python is too new, simulated by stubs: no network, nothing installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = (
    "bash",
    "cat",
    "chmod",
    "cksum",
    "comm",
    "cp",
    "dirname",
    "head",
    "mkdir",
    "mktemp",
    "rm",
    "sort",
    "tail",
    "tr",
)
# One program plays all parts by its name: pythons, which create environments and install, and uv, which fetches 3.12.
STUB = """#!{bash}
echo "${{0##*/}} $*" >> {log}
case "${{0##*/}} $1" in
    "python3 -c") exit 1 ;;
    "python3.12 -c" | "python -c") exit 0 ;;
    *"--version") [ "${{0##*/}}" = python3 ] && echo Python 3.13.1 || echo Python 3.12.9 ;;
    "python3 -m" | "python3.12 -m" | "python -m")
        if [ "$2" = venv ]; then
            for folder in "$@"; do :; done
            mkdir -p "$folder/bin" && cp {stub} "$folder/bin/python"
        elif [ "$2" = pip ]; then
            [ {pip} = works ] && cp {stub} "${{0%/*}}/uv"
        fi ;;
    "uv python")
        case "$2" in
            install) [ {uv} = works ] ;;
            find) cp {stub} {fetched} && echo {fetched} ;;
        esac ;;
esac
"""


def run_setup(folder: Path, pip: str = "works", uv: str = "works") -> tuple[subprocess.CompletedProcess[str], str]:
    """Run the script in a copy of the project, with Python 3.13 alone on PATH; return its outcome and all calls."""
    project, path = folder / "project", folder / "path"
    (project / "scripts").mkdir(parents=True)
    path.mkdir()
    shutil.copy(ROOT / "scripts" / "setup", project / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        (project / name).touch()
    for name in TOOLS:
        found = shutil.which(name)
        assert found, name
        (path / name).symlink_to(found)
    stub, log = folder / "stub", folder / "log"
    stub.write_text(
        STUB.format(bash=shutil.which("bash"), log=log, stub=stub, pip=pip, uv=uv, fetched=folder / "python3.12")
    )
    stub.chmod(0o755)
    shutil.copy(stub, path / "python3")
    environment = {"PATH": str(path), "TMPDIR": str(folder), "HOME": str(folder)}
    done = subprocess.run(
        [project / "scripts" / "setup", "dev"], env=environment, capture_output=True, text=True, timeout=60
    )
    return done, log.read_text()


def test_newer_python_uses_the_one_that_uv_fetches(tmp_path: Path) -> None:
    done, calls = run_setup(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "found Python 3.13.1; fetching Python 3.12 with uv" in done.stdout
    assert "installing into .venv (Python 3.12.9)" in done.stdout
    assert "uv python install --quiet 3.12" in calls
    assert "python3.12 -m venv --clear .venv" in calls
    install = "uv pip install --quiet --compile-bytecode --python .venv/bin/python"
    assert f"{install} -c constraints.txt -e .[local,dev]" in calls
    assert (tmp_path / "project" / ".venv" / ".set-up").read_text().splitlines()[-2:] == ["dev", "local"]
    assert not list(tmp_path.glob("tmp.*")), "the environment that uv came in is left behind"


@pytest.mark.parametrize("broken", ["pip", "uv"])
def test_newer_python_without_a_fetched_one_fails_in_one_line(tmp_path: Path, broken: str) -> None:
    """Whether uv cannot be installed or cannot fetch a Python."""
    done, _ = run_setup(tmp_path, **{broken: "fails"})
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("scripts/setup: needs Python 3.11 or 3.12"), line
    assert "found Python 3.13.1" in line
    assert "install python3.12" in line
    assert not (tmp_path / "project" / ".venv").exists()


def test_no_python_at_all_fails_in_one_line(tmp_path: Path) -> None:
    run_setup(tmp_path)
    shutil.rmtree(tmp_path / "project" / ".venv")
    (tmp_path / "path" / "python3").unlink()
    environment = {"PATH": str(tmp_path / "path"), "TMPDIR": os.fspath(tmp_path), "HOME": os.fspath(tmp_path)}
    done = subprocess.run(
        [tmp_path / "project" / "scripts" / "setup"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "found no Python" in line
