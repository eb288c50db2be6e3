"""`scripts/demo` from a folder without data: every count is right, and no foreign line reaches the terminal."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.harness import ROOT


@pytest.mark.timeout(600)
def test_demo_counts_are_right_and_its_output_is_clean(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    del environment["K2FLOW_HOME"]
    command = [sys.executable, "-m", "demo"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=580)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "DIFFERS" not in output
    assert "-- killed binance with " in output
    tables = re.findall(r"^[┏┃].*", done.stdout, re.MULTILINE)
    assert re.sub(r"\W+", " ", tables[-1]).split() == ["minute", "open", "high", "low", "close", "volume", "trades"]
    candles = done.stdout[done.stdout.rindex(tables[-1]) :]
    assert len(re.findall(r"^│ +\d\d:\d\d", candles, re.MULTILINE)) == 8
    foreign = [line for line in output.splitlines() if re.search(r"rdkafka|\[thrd:|GETPID|^%\d\|", line)]
    assert not foreign, "\n".join(foreign)
    assert (tmp_path / ".k2flow" / "demo" / "report.html").stat().st_size > 10_000
