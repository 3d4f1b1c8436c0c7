"""The report of a run: one HTML file that needs no network, made from the run folder. `write.py` is the way in."""
