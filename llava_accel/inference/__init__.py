"""Answers from a model: generation, dialogue, loading of trained weights. Nothing is trained here."""
