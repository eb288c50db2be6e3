"""Logs, Prometheus metrics, health checks and OpenTelemetry traces of k2flow's processes."""
