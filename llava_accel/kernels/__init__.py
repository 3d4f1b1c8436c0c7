"""Faster ways to compute the same numbers: matrix products, LoRA layers, elementwise work, compiled layers.

Nothing here knows recipes' tables, files or engines.
"""
