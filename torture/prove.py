"""Proves that the tests notice: they must fail once a safeguard is switched off."""

import os
import re
import subprocess
import sys

from torture.flows import flow_environment
from torture.mutations import MUTATIONS
from torture.report import console

TESTS = ("tests/integration/test_commit.py", "tests/integration/test_failpoints.py", "-k", "not every_failpoint")


def tests_fail_without(names: str) -> bool:
    """Return whether tests fail with these safeguards (separated by commas) switched off; print which."""
    unknown = set(names.split(",")) - MUTATIONS.keys()
    if unknown:
        raise SystemExit(f"unknown mutation: {', '.join(sorted(unknown))}; known are {', '.join(MUTATIONS)}")
    environment = {**flow_environment({}), "TORTURE_MUTATIONS": names}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", *TESTS]
    result = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    failed = re.findall(r"^FAILED (\S+)", result.stdout, re.MULTILINE)
    for each in failed:
        console.print(f"without {names}: fails {each}", markup=False)
    if not failed:
        console.print(f"without {names}: no test fails\n{os.linesep.join(result.stdout.splitlines()[-5:])}")
    return bool(failed)
