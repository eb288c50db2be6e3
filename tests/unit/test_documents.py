"""The documents are about what there is: alerts, errors, modules, and pages that links lead to."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.documents import ROOT, Kind, documents, is_known, kind, parse, settings_of
from tests.unit.test_alerts import rules

OPERATIONS = (ROOT / "docs" / "operations.md").read_text("utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
PAGES = [*documents(), *sorted((ROOT / "docs" / "adr").glob("*.md"))]
FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
VALUE = "\0"
"""What stands for a value in a message, in the source as well as in a document."""


def section(text: str, title: str) -> str:
    """What stands under a heading, up to the next one of its level or a higher one."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, title
    level = len(found[1])
    rest = text[found.start(2) :]
    end = re.search(rf"^#{{1,{level}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def test_every_alert_has_a_section_and_every_section_an_alert() -> None:
    alerts = section(OPERATIONS, "Alerts")
    assert re.findall(r"^### (\w+)$", alerts, re.MULTILINE) == list(rules())
    for name in rules():
        told = section(OPERATIONS, name)
        assert [word for word in ("Means", "Look", "Do", "Over") if f"- **{word}**" in told] == [
            "Means", "Look", "Do", "Over",
        ], name  # fmt: skip


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in LINK.findall(FENCED.sub("", path.read_text("utf-8"))):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{path.name}: {target}"


def test_the_messages_that_errors_are_known_by_are_in_the_code() -> None:
    """Of each row of the table of errors; `...` and numbers stand for what a message says of its case."""
    source = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "k2flow").rglob("*.py")))
    source = re.sub(r"\{[^{}]*\}", VALUE, re.sub(r'"\s*\n\s*f?"', "", source))
    rows = re.findall(r"^\| (`.*?) \|", section(OPERATIONS, "Errors"), re.MULTILINE)
    said = [text for row in rows for text in re.findall(r"`([^`]+)`", row)]
    assert len(said) > 25
    for text in said:
        pattern = re.sub(r"\d+", VALUE, re.escape(text)).replace(r"\.\.\.", f"{VALUE}[^\n]*?")
        assert re.search(pattern, source), text


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_setting_that_is_named_is_known(path: Path) -> None:
    """Wherever a document names it; `<EXCHANGE>` stands for one, and names that end with `_` for many. Kubernetes too
    makes variables, of the names of services."""
    text = path.read_text("utf-8").replace("K2FLOW_<EXCHANGE>_", "K2FLOW_BINANCE_")
    named = set(re.findall(r"(?<![A-Z_])K2FLOW_[A-Z0-9_]*", text))
    assert not [name for name in named if not name.endswith(("_", "_SERVICE_HOST")) and not is_known(name)]


def test_every_module_is_on_the_map() -> None:
    table = section(ARCHITECTURE, "Module map")
    named = set(re.findall(r"`(\w+)/?`", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line)))
    folder = ROOT / "k2flow"
    there = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    assert named == there - {"__init__", "__main__"}


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
def test_what_is_done_with_a_command(line: str, expected: Kind) -> None:
    words = line.split()
    assert kind(words) is expected
    if words[0] == "k2flow":
        parse(words)


@pytest.mark.parametrize("line", ["spark-submit job.py", "scripts/no-such", "python -m bytewax.run flows.ftx"])
def test_a_command_that_is_unknown_is_noticed(line: str) -> None:
    with pytest.raises(AssertionError):
        kind(line.split())


@pytest.mark.parametrize("line", ["k2flow run", "k2flow audit --jsn", "k2flow nothing", "k2flow dlq show binance x 1"])
def test_a_command_line_that_k2flow_does_not_take_is_noticed(line: str) -> None:
    with pytest.raises(Exception, match=r"Missing|No such|valid integer"):
        parse(line.split())


def test_a_setting_that_is_unknown_is_noticed() -> None:
    assert settings_of(["export", "K2FLOW_KRAKEN_TRIGGER_SECONDS=1"]) == ({"K2FLOW_KRAKEN_TRIGGER_SECONDS": "1"}, [])
    with pytest.raises(AssertionError, match="K2FLOW_KRAKEN_TRIGER is no setting"):
        settings_of(["K2FLOW_KRAKEN_TRIGER=1", "k2flow", "audit"])


def test_the_picture_is_one() -> None:
    root = ElementTree.parse(ROOT / "docs" / "architecture.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in ElementTree.tostring(root, "unicode")
