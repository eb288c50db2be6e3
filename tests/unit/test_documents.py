"""The documents match the code: alerts, errors, modules, settings, public names and links."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

import k2flow
from k2flow.layers import BRONZE, DLQ, GOLD, SILVER
from k2flow.trades.reasons import Reason
from tests.documents import ROOT, Kind, documents, is_known, kind, parse, settings_of
from tests.unit.test_alerts import rules

OPERATIONS = (ROOT / "docs" / "operations.md").read_text("utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
TABLES = (ROOT / "docs" / "tables.md").read_text("utf-8")
API = (ROOT / "docs" / "api.md").read_text("utf-8")
PAGES = [*documents(), ROOT / "CHANGELOG.md", *sorted((ROOT / "docs" / "adr").glob("*.md"))]
FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
VALUE = "\0"
"""Replaces each value in a message, in the source and in the documents."""


def section(text: str, title: str) -> str:
    """Return the text under a heading, up to the next heading of its level or above."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, title
    level = len(found[1])
    rest = text[found.start(2) :]
    end = re.search(rf"^#{{1,{level}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def test_alerts_and_their_sections_match() -> None:
    alerts = section(OPERATIONS, "Alerts")
    assert re.findall(r"^### (\w+)$", alerts, re.MULTILINE) == list(rules())
    for name in rules():
        text = section(OPERATIONS, name)
        assert re.findall(r"^- \*\*(\w+)\*\*", text, re.MULTILINE) == ["Means", "Check", "Do", "Resolved"], name


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub builds them."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_has_a_target(path: Path) -> None:
    for target in LINK.findall(FENCED.sub("", path.read_text("utf-8"))):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{path.name}: {target}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_path_exists(path: Path) -> None:
    text = path.read_text("utf-8")
    names = re.findall(r"`((?:bench|demo|docker|docs|k2flow|kubernetes|scripts|tests|torture)/[\w./-]+)`", text)
    assert not [name for name in names if "secrets" not in name and not (ROOT / name).exists()]


def test_indexed_error_messages_are_in_the_code() -> None:
    """`...` and numbers stand for the values of a message."""
    source = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "k2flow").rglob("*.py")))
    source = re.sub(r"\{[^{}]*\}", VALUE, re.sub(r'"\s*\n\s*f?"', "", source))
    rows = re.findall(r"^\| (`.*?) \|", section(OPERATIONS, "Errors"), re.MULTILINE)
    messages = [text for row in rows for text in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 25
    for text in messages:
        pattern = re.sub(r"\b\d+", VALUE, re.escape(text)).replace(r"\.\.\.", f"{VALUE}[^\n]*?")
        assert re.search(pattern, source), text


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_setting_is_known(path: Path) -> None:
    """`<EXCHANGE>` stands for any exchange, a final `_` for any rest. Kubernetes names variables after services."""
    text = path.read_text("utf-8").replace("K2FLOW_<EXCHANGE>_", "K2FLOW_BINANCE_")
    names = set(re.findall(r"(?<![A-Z_])K2FLOW_[A-Z0-9_]*", text))
    assert not [name for name in names if not name.endswith(("_", "_SERVICE_HOST")) and not is_known(name)]


def test_module_map_is_complete() -> None:
    table = section(ARCHITECTURE, "Module map")
    named = set(re.findall(r"`(\w+)/?`", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line)))
    folder = ROOT / "k2flow"
    there = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    assert named == there - {"__init__", "__main__"}


def test_columns_and_reasons_match_the_code() -> None:
    rows = {
        row[0]: row[1]
        for row in re.findall(r"^\| ([\w ]+) \| (`\w+` [a-z].*) \|$", section(TABLES, "Columns"), re.MULTILINE)
    }
    for name, layer in {"Bronze": BRONZE, "Silver": SILVER, "dead letters": DLQ}.items():
        assert rows[name].replace("\\", "") == ", ".join(f"`{field.name}` {field.type}" for field in layer.fields)
    assert GOLD.columns == (*SILVER.columns, "exchange_hour")
    table = re.findall(r"^\| (`.*?) \|", section(TABLES, "Reasons of dead letters"), re.MULTILINE)
    assert re.findall(r"`(\w+)`", " ".join(table)) == [reason.code for reason in Reason if reason is not Reason.VALID]


def test_every_public_name_has_a_section() -> None:
    headings = re.findall(r"^## `?(\w+)", API, re.MULTILINE)
    errors = {name for name in k2flow.__all__ if name.endswith("Error")}
    assert {*headings} >= {*k2flow.__all__} - errors
    assert all(f"`{name}`" in section(API, "Errors") for name in errors)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("k2flow audit --json", Kind.RUN),
        ("k2flow run binance --until-caught-up", Kind.RUN),
        ("k2flow run binance kraken", Kind.PARSE),
        ("k2flow maintain --every 5m", Kind.PARSE),
        ("k2flow dlq replay binance", Kind.PROCESS),
        ("k2flow dlq replay binance --dry-run", Kind.RUN),
        ("python -m bytewax.run flows.kraken", Kind.PROCESS),
        ("scripts/demo --keep", Kind.OTHER),
    ],
)
def test_command_kinds(line: str, expected: Kind) -> None:
    words = line.split()
    assert kind(words) is expected
    if words[0] == "k2flow":
        parse(words)


@pytest.mark.parametrize("line", ["spark-submit job.py", "scripts/no-such", "python -m bytewax.run flows.ftx"])
def test_unknown_command_fails(line: str) -> None:
    with pytest.raises(AssertionError):
        kind(line.split())


@pytest.mark.parametrize("line", ["k2flow run", "k2flow audit --jsn", "k2flow nothing", "k2flow dlq show binance x 1"])
def test_invalid_command_line_fails(line: str) -> None:
    with pytest.raises(Exception, match=r"Missing|No such|valid integer"):
        parse(line.split())


def test_unknown_setting_fails() -> None:
    assert settings_of(["export", "K2FLOW_KRAKEN_TRIGGER_SECONDS=1"]) == ({"K2FLOW_KRAKEN_TRIGGER_SECONDS": "1"}, [])
    with pytest.raises(AssertionError, match="K2FLOW_KRAKEN_TRIGER is not a setting"):
        settings_of(["K2FLOW_KRAKEN_TRIGER=1", "k2flow", "audit"])


def test_picture_is_svg_with_a_dark_scheme() -> None:
    root = ElementTree.parse(ROOT / "docs" / "architecture.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in ElementTree.tostring(root, "unicode")
