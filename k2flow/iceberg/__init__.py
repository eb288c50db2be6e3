"""Iceberg: the tables, their files and their commits."""
