"""Prepares all that a run needs before its first step: data, objective, feature cache, run folder. No step is taken."""
