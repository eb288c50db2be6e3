"""The tiers of scripts/test: which tests each one runs, and that none runs nothing in silence."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import LONGEST_FIRST, SLOW_FILES, TESTS, pytest_collection_modifyitems

ROOT = TESTS.parent
SCRIPT = (ROOT / "scripts" / "test").read_text("utf-8")
SELECT = {"fast": "not integration and not slow", "default": "not slow", "all": ""}


@pytest.mark.parametrize("name", [*SLOW_FILES, *LONGEST_FIRST])
def test_listed_file_exists(name: str) -> None:
    """A file that was renamed must not drop out of its tier unnoticed."""
    assert (TESTS / name).is_file()


@pytest.mark.parametrize("tier", SELECT)
def test_script_selects_the_markers_of_a_tier(tier: str) -> None:
    assert re.search(rf'tier={tier} extras=\S+ select="{SELECT[tier]}"', SCRIPT)


class CollectedTest:
    """A test as the collection hook sees it."""

    def __init__(self, name: str) -> None:
        self.path = TESTS / name
        self.markers: set[str] = set()

    def add_marker(self, marker: pytest.MarkDecorator) -> None:
        self.markers.add(marker.name)


@pytest.mark.parametrize(
    ("name", "tiers"),
    [
        ("unit/test_new.py", {"fast", "default", "all"}),
        ("property/test_new.py", {"fast", "default", "all"}),
        ("integration/test_new.py", {"default", "all"}),
        *((name, {"all"}) for name in SLOW_FILES),
    ],
)
def test_file_falls_in_the_tiers_of_its_folder(name: str, tiers: set[str]) -> None:
    test = CollectedTest(name)
    pytest_collection_modifyitems([test])  # type: ignore[list-item]
    markers = {each: each in test.markers for each in ("integration", "slow")}
    assert {tier for tier, select in SELECT.items() if eval(select or "True", markers)} == tiers


def test_contributing_lists_each_file_in_its_tier() -> None:
    """CONTRIBUTING.md says what each tier proves."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    _, fast, default, everything = re.split(r"^\*\*(?:fast|default|all)\*\*$", text, flags=re.MULTILINE)
    everything = everything.split("\n## ")[0]
    slow = {Path(name).name for name in SLOW_FILES}
    assert set(re.findall(r"test_\w+\.py", everything)) == slow
    assert not set(re.findall(r"test_\w+\.py", fast + default)) & slow


def test_tier_without_tests_fails_and_says_so(tmp_path: Path) -> None:
    """Pytest exits with 5 if it selects no test; the script reports it."""
    script = tmp_path / "scripts" / "test"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    for name, body in {"scripts/setup": "", ".venv/bin/python": "exit 5"}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    done = subprocess.run(["bash", str(script), "fast", "-k", "nothing"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 5
    assert re.search(r"tier fast, seed \d+, \d+ min \d+ s: FAILED: no test matches", done.stdout)
