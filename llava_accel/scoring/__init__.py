"""Scores answers: metrics, one pass over held-out data, which evaluation is best. No weight is saved here."""
