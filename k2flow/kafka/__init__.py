"""Kafka: consumers of whole Arrow batches, topics and their offsets, administration, TLS."""
