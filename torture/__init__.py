"""What `scripts/torture` does: both flows under faults of every kind, then every row compared with an oracle."""
