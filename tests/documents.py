"""Parse the code blocks of the documents, and run or check the commands in them."""

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

from k2flow.cli.commands import app
from k2flow.config.settings import KAFKA_PREFIX, PREFIX, REGISTRY_VARIABLES, ExchangeSettings, Settings
from k2flow.exchange import exchange_names
from tests.conftest import forget_settings

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^( *)```(\S*) ?([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r"([A-Z][A-Z0-9_]+)=(.*)", re.DOTALL)
OTHER_TOOLS = {
    *(
        "cd",
        "cp",
        "curl",
        "docker",
        "git",
        "helm",
        "install",
        "kubectl",
        "mkdir",
        "pg_dump",
        "pip",
        "pipx",
        "rm",
        "sudo",
        "systemctl",
        "uvx",
    )
}
"""Commands that documents may show and no test runs."""
OTHER_LANGUAGES = {"", "text", "yaml", "json", "ini", "toml", "dockerfile"}
"""Languages of blocks that no test runs."""
FOREIGN = ("PYICEBERG_", "AWS_", "PG", "OTEL_", "PYTHON")
"""Prefixes of variables that belong to other software."""


@dataclass(frozen=True)
class Block:
    """One fenced block: its place, its language, the rest of the opening line, its text."""

    path: Path
    line: int
    language: str
    info: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}"

    def commands(self) -> list[list[str]]:
        """Return the words of each shell command, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


class Kind(Enum):
    """How a test treats a command."""

    RUN = auto()
    """Run it in this process: it is a command of k2flow."""
    PROCESS = auto()
    """Run it in its own process: a flow until it has caught up, or a command that must not look like a running flow."""
    PARSE = auto()
    """Parse its arguments only: it would run forever, or needs values that a document cannot know."""
    OTHER = auto()
    """Do nothing: it is a known command of other software."""


def documents() -> list[Path]:
    """Return the pages whose code blocks are tested."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path) -> list[Block]:
    """Return all fenced blocks of a document, in order."""
    text = path.read_text("utf-8")
    return [
        Block(path, text.count("\n", 0, found.start()) + 1, found[2], found[3].strip(), dedent(found[4]))
        for found in FENCE.finditer(text)
    ]


def settings_of(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split a command line into the variables that it sets or exports, which must be known, and the command."""
    rest = list(words[1:] if words[0] == "export" else words)
    found = {}
    while rest and (setting := ASSIGNMENT.fullmatch(rest[0])):
        assert is_known(setting[1]), f"{setting[1]} is not a setting"
        found[setting[1]] = setting[2]
        rest.pop(0)
    assert not rest or words[0] != "export", words
    return found, rest


def is_known(variable: str) -> bool:
    """Return whether a variable is a setting of k2flow or its libraries. K2FLOW_COINBASE_* is the tutorial's."""
    if not variable.startswith(PREFIX):
        return variable.startswith(FOREIGN)
    names = {*exchange_names(), "coinbase"}
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    known |= set(REGISTRY_VARIABLES)
    known |= {f"{PREFIX}{e.upper()}_{name.upper()}" for e in names for name in ExchangeSettings.model_fields}
    return variable in known or variable.startswith(KAFKA_PREFIX)


def kind(command: Sequence[str]) -> Kind:
    """Return how to treat a command. Fails if it is unknown."""
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
        case ["python", "-m", "build" | "pip", *_]:  # test_package.py runs them
            return Kind.OTHER
        case [script, *_] if script.startswith("scripts/"):
            assert os.access(ROOT / script, os.X_OK), f"{script} does not exist"
            return Kind.OTHER
        case [tool, *_] if tool in OTHER_TOOLS:
            return Kind.OTHER
    raise AssertionError(f"unknown command {shlex.join(command)!r}: add it to tests/documents.py")


def parse(command: Sequence[str]) -> None:
    """Fail if k2flow's command line rejects the command: unknown options, missing arguments."""
    here: Any = typer.main.get_command(app)
    context, name, rest = None, command[0], list(command[1:])
    while True:
        context = here.make_context(name, rest, parent=context)
        if not hasattr(here, "resolve_command"):
            return
        name, here, rest = here.resolve_command(context, [*context._protected_args, *context.args])


def run(command: Sequence[str], settings: Mapping[str, str] = MappingProxyType({})) -> str:
    """Run a command of k2flow in this process, with additional `settings`, and return its output. Fail if it fails."""
    with as_a_process():
        os.environ.update(settings)
        done = CliRunner().invoke(app, list(command[1:]))
    holes = command[1] == "gaps" and done.exit_code == 1  # trades that were dead letters
    assert done.exit_code == 0 or holes, f"{shlex.join(command)}: {done.exception!r}\n{done.output}"
    return done.stdout


def run_process(command: Sequence[str], settings: Mapping[str, str] = MappingProxyType({})) -> None:
    """Run `k2flow` or `python -m bytewax.run` in its own process; a flow runs until it has caught up."""
    arguments = ["-m", *command] if command[0] == "k2flow" else command[1:]
    environment = {**os.environ, **settings, "K2FLOW_UNTIL_CAUGHT_UP": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"


@contextmanager
def as_a_process() -> Iterator[None]:
    """Undo afterwards what a command does to its process, and read settings again."""
    environment, root = dict(os.environ), logging.getLogger()
    handlers, level, iceberg = root.handlers[:], root.level, logging.getLogger("pyiceberg").level
    handling = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with warnings.catch_warnings():
        forget_settings()
        try:
            yield
        finally:
            forget_settings()
            os.environ.clear()
            os.environ.update(environment)
            for number, handler in handling.items():
                signal.signal(number, handler)
            root.handlers[:] = handlers
            root.setLevel(level)
            logging.getLogger("pyiceberg").setLevel(iceberg)
