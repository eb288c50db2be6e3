"""k2flow beside its peers: Flink and Kafka Connect, each with Iceberg's own sink."""
