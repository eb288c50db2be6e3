"""One-minute candles: a table that is a pure function of Gold at one of its snapshots."""
