"""Checks of a recipe's data and model, made before training: what `check` finds and shows."""
