"""A real local Apache Kafka for people and tests without one: see `k2flow.sandbox.kafka.local.LocalKafka`."""
