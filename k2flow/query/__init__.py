"""SQL over the tables with DuckDB."""
