"""k2flow beside Flink with Iceberg's own sink."""
