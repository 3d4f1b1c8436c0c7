"""Proposes a first recipe: the keys that depend on data, base and GPU. Nothing is trained, and no weight is loaded."""
