"""Answers from a model: generation, dialogue, loading what was trained. Nothing that trains."""
