"""The report: from a run folder to one HTML file. Nothing here changes a run."""
