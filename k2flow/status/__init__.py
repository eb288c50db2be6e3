"""Lag, throughput, dead letters and table health, from Kafka and the tables alone; the size of the window."""
