"""A real local Apache Kafka, for people and tests that have none: see `k2flow.kafka.local.LocalKafka`."""
