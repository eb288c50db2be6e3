"""`scripts/demo`: k2flow at work on one machine."""
