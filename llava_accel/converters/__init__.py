"""From published data sets and tables to records. Only `prepare` uses it; nothing of a run."""
