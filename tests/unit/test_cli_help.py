"""Help of all commands: it imports no slow library, and it is true."""

import json
import re
import resource
import subprocess
import sys

import pytest

from k2flow.exchange import find_exchange

SLOW = {
    "bytewax",
    "confluent_kafka",
    "duckdb",
    "numpy",
    "prometheus_client",
    "pyarrow",
    "pydantic",
    "pyiceberg",
    "rich",
    "sqlalchemy",
}
CPU_SECONDS = 0.5
PRINT_ALL_HELP = """
import contextlib, io, json, sys
import typer
from k2flow.__main__ import main
from k2flow.cli.commands import app

def paths(command, path):
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from paths(child, (*path, name))

pages = {}
for path in list(paths(typer.main.get_command(app), ())):
    sys.argv = ["k2flow", *path, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        main()
    modules = {name.partition(".")[0] for name in sys.modules}
    pages[" ".join(path)] = {"text": output.getvalue(), "modules": sorted(modules)}
print(json.dumps(pages))
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The help of each command, in one fresh process: its text, and the packages imported so far."""
    folder = tmp_path_factory.mktemp("working")
    (folder / ".pyiceberg.yaml").write_text("catalog: {}\n")  # help does not check it: that imports PyIceberg
    command = [sys.executable, "-c", PRINT_ALL_HELP]
    found: dict[str, dict[str, str]] = json.loads(subprocess.check_output(command, cwd=folder, timeout=60))
    return found


def test_help_imports_no_slow_library(pages: dict[str, dict[str, str]]) -> None:
    assert {"", "run", "audit", "tables create", "dlq list", "kafka start"} <= pages.keys()
    for command, page in pages.items():
        assert f"Usage: k2flow {command}".rstrip() in page["text"]
        assert not SLOW & set(page["modules"]), command


def test_help_takes_little_cpu() -> None:
    """The best of three runs counts, since other processes slow a run down."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "k2flow", "--help"], stdout=subprocess.DEVNULL, timeout=60, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < CPU_SECONDS


def test_every_command_argument_and_option_has_help(pages: dict[str, dict[str, str]]) -> None:
    """Help follows its name after two spaces, or on the next line; the list of commands cuts no sentence off."""
    for command, page in pages.items():
        rows = re.split(r"\n  (?=\S)", re.split(r"\n(?:Arguments|Options):", page["text"], maxsplit=1)[1])[1:]
        for row in rows:
            assert re.search(r"\S(?:  +|\n +)[A-Z]", row), (command, row)
            assert not row.endswith("..."), (command, row)


def test_help_of_run_has_the_declared_processes(pages: dict[str, dict[str, str]]) -> None:
    text = " ".join(pages["run"]["text"].split())
    named = re.findall(r"`k2flow run (\w+)` starts (\d+) ", text)
    assert {name: int(count) for name, count in named} == {
        name: find_exchange(name).declared["processes"] for name in ("binance", "kraken")
    }
