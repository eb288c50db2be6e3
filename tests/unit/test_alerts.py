"""The dashboard and the alert rules query metrics that k2flow exports, and the rules fire when they should."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from k2flow.audit.report import AuditCollector, Verdict
from k2flow.gaps.metrics import GapMetrics
from k2flow.observability import metrics
from k2flow.status.metrics import StatusMetrics
from k2flow.status.model import Status

DOCKER = Path(__file__).parents[2] / "docker"
RULES = DOCKER / "prometheus" / "rules.yml"
DASHBOARD: dict[str, Any] = json.loads((DOCKER / "grafana" / "dashboards" / "k2flow.json").read_text())
OTHERS = {"up"}
"""Metrics that Prometheus itself exports."""
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}


def exported() -> set[str]:
    """Return the names of all samples that a flow, its status and audits can export."""
    assert metrics.ROWS in REGISTRY._collector_to_names
    nothing = Status(0, 0.0, {}, {}, {})
    collector = StatusMetrics(lambda: nothing)
    collector.update()
    audited = AuditCollector()
    audited.record(Verdict.HOLDS, [], "2026-01-01T00:00:00+00:00")
    gaps = GapMetrics(lambda _: {})
    families = [*REGISTRY.collect(), *collector.collect(), *audited.collect(), *gaps.collect()]
    return {family.name + suffix for family in families for suffix in SUFFIXES.get(family.type, ("",))}


def rules() -> dict[str, str]:
    """Return the expression of each alert."""
    return dict(re.findall(r"- alert: (\w+)\n\s+expr: (.+)", RULES.read_text()))


def expressions() -> Iterator[str]:
    yield from rules().values()
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for variable in DASHBOARD["templating"]["list"]:
        yield variable["definition"]


def test_every_queried_metric_is_exported() -> None:
    names = {name for expression in expressions() for name in re.findall(r"\b(?:k2flow_\w+|up)\b", expression)}
    assert len(names) > 15
    assert names - exported() == OTHERS


def test_panels_do_not_overlap_and_variables_are_declared() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    declared = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = {name for expression in expressions() for name in re.findall(r"\$(\w+)", expression)}
    assert used == declared | {"__rate_interval"}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_every_rule_has_a_test() -> None:
    tested = set(re.findall(r"alertname: (\w+)", (DOCKER / "prometheus" / "rules.test.yml").read_text()))
    assert tested == set(rules())


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is missing (Debian: prometheus)")
@pytest.mark.parametrize(
    "command",
    [["check", "config", "prometheus.yml"], ["check", "rules", "rules.yml"], ["test", "rules", "rules.test.yml"]],
)
def test_rules_fire_when_they_should(command: list[str]) -> None:
    done = subprocess.run(["promtool", *command], cwd=RULES.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
