"""Measurements, each beside what it is compared with, in one run. Not tests: nothing here fails for being slow."""
