"""A real local Apache Kafka, for people and tests that have none: see `k2flow.sandbox.kafka.local.LocalKafka`."""
