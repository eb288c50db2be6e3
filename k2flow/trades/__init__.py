"""Trades: batches of messages, their schemas, decoding, validation, deduplication, and the pipeline of all steps."""
