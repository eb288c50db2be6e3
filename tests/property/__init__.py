"""Property tests, with independent oracles."""

import os

FAST_SHARE = 5


def examples(count: int) -> int:
    """Return how many random examples a test draws: `count`, or a fifth of them in the fast tier."""
    return max(5, count // FAST_SHARE) if os.environ.get("TEST_TIER") == "fast" else count
