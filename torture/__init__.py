"""`scripts/torture`: run both flows under faults of every kind, then compare every row with an oracle."""
