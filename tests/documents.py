"""The code blocks of README.md and docs/*.md, and how the commands in them are run, or checked without a run."""

import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from textwrap import dedent
from types import MappingProxyType
from typing import Any

import typer
from typer.testing import CliRunner

from k2flow.cli.main import app
from k2flow.config.settings import KAFKA_PREFIX, PREFIX, ExchangeSettings, Settings
from k2flow.exchange import all_exchanges, exchange_names

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^( *)```(\S*) ?([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r"([A-Z][A-Z0-9_]+)=(.*)", re.DOTALL)
OTHER_TOOLS = {"cd", "cp", "curl", "docker", "git", "helm", "install", "kubectl", "mkdir", "pg_dump", "pip", "sudo"}
"""Commands that documents may show and nobody runs here."""
OTHER_LANGUAGES = {"", "text", "yaml", "json", "ini", "toml", "dockerfile"}
"""Of blocks that are not there to be run."""
FOREIGN = ("PYICEBERG_", "AWS_", "PG", "OTEL_", "PYTHON")
"""What the names of variables begin with that are not k2flow's own."""


@dataclass(frozen=True)
class Block:
    """One fenced block: in what language, what stands beside that, its text, and where it is."""

    path: Path
    line: int
    language: str
    info: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The words of each command of a block of shell; comments are left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


class Kind(Enum):
    """What is done with a command."""

    RUN = auto()
    """Of k2flow's: run in this process."""
    PROCESS = auto()
    """Run in a process of its own: a flow, until it has caught up, or what a flow must not take for one that runs."""
    PARSE = auto()
    """Of k2flow's: it would run for ever, or needs what no document can know."""
    OTHER = auto()
    """Of others, which are known."""


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path) -> list[Block]:
    """All fenced blocks of a document, in order."""
    text = path.read_text("utf-8")
    return [
        Block(path, text.count("\n", 0, found.start()) + 1, found[2], found[3].strip(), dedent(found[4]))
        for found in FENCE.finditer(text)
    ]


def settings_of(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The variables that a command line sets, for itself or by `export`, whose names must be known; and the rest."""
    rest = list(words[1:] if words[0] == "export" else words)
    found = {}
    while rest and (setting := ASSIGNMENT.fullmatch(rest[0])):
        assert is_known(setting[1]), f"{setting[1]} is no setting"
        found[setting[1]] = setting[2]
        rest.pop(0)
    assert not rest or words[0] != "export", words
    return found, rest


def is_known(variable: str) -> bool:
    """Whether a variable is a setting of k2flow or of what it is made of. K2FLOW_COINBASE_* is the tutorial's."""
    if not variable.startswith(PREFIX):
        return variable.startswith(FOREIGN)
    names = {*exchange_names(), "coinbase"}
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    known |= {f"{PREFIX}{e.upper()}_{name.upper()}" for e in names for name in ExchangeSettings.model_fields}
    return variable in known or variable.startswith(KAFKA_PREFIX)


def kind(command: Sequence[str]) -> Kind:
    """What a command is. Fails for one that is unknown."""
    match command:
        case ["k2flow", "dlq", "show", *_]:
            return Kind.PARSE
        case ["k2flow", "run", *options]:
            return Kind.RUN if "--until-caught-up" in options else Kind.PARSE
        case ["k2flow", "reprocess", *options] | ["k2flow", "dlq", "replay", *options]:
            return Kind.RUN if "--dry-run" in options else Kind.PROCESS
        case ["k2flow", *words]:
            return Kind.PARSE if {"--watch", "--every"} & set(words) else Kind.RUN
        case ["python", "-m", "bytewax.run", flow]:
            assert flow.removeprefix("flows.") in {*exchange_names(), "coinbase"}, flow
            return Kind.PROCESS
        case [script, *_] if script.startswith("scripts/"):
            assert os.access(ROOT / script, os.X_OK), f"{script} is not there"
            return Kind.OTHER
        case [tool, *_] if tool in OTHER_TOOLS:
            return Kind.OTHER
    raise AssertionError(f"{shlex.join(command)!r} is no command that is known here: see tests/documents.py")


def parse(command: Sequence[str]) -> None:
    """Fails where the command line would not take a command of k2flow's: unknown options, missing arguments."""
    here: Any = typer.main.get_command(app)
    context, name, rest = None, command[0], list(command[1:])
    while True:
        context = here.make_context(name, rest, parent=context)
        if not hasattr(here, "resolve_command"):
            return
        name, here, rest = here.resolve_command(context, [*context._protected_args, *context.args])


def run(command: Sequence[str], settings: Mapping[str, str] = MappingProxyType({})) -> str:
    """What a command of k2flow's prints, run in this process, with more `settings`. Fails if it does."""
    with as_a_process():
        os.environ.update(settings)
        done = CliRunner().invoke(app, list(command[1:]))
    assert done.exit_code == 0, f"{shlex.join(command)}: {done.exception!r}\n{done.output}"
    return done.stdout


def run_process(command: Sequence[str], settings: Mapping[str, str] = MappingProxyType({})) -> None:
    """Runs `k2flow` or `python -m bytewax.run` in a process of its own; a flow until it has caught up."""
    arguments = ["-m", *command] if command[0] == "k2flow" else command[1:]
    environment = {**os.environ, **settings, "K2FLOW_UNTIL_CAUGHT_UP": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"


@contextmanager
def as_a_process() -> Iterator[None]:
    """What a command does to its process, this one is without afterwards; and settings are read anew."""
    environment, root = dict(os.environ), logging.getLogger()
    handlers, level, iceberg = root.handlers[:], root.level, logging.getLogger("pyiceberg").level
    handling = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with warnings.catch_warnings():
        _forget_settings()
        try:
            yield
        finally:
            _forget_settings()
            os.environ.clear()
            os.environ.update(environment)
            for number, handler in handling.items():
                signal.signal(number, handler)
            root.handlers[:] = handlers
            root.setLevel(level)
            logging.getLogger("pyiceberg").setLevel(iceberg)


def _forget_settings() -> None:
    for exchange in all_exchanges():
        vars(exchange).pop("settings", None)
