"""How good answers are: metrics, one pass over held-out data, which evaluation is best. Nothing is saved here."""
