"""A market on one machine: a local Kafka and a producer of simulated trades, to try k2flow and to test it."""
