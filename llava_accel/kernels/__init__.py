"""What computes the same numbers faster: matrix products, LoRA layers, elementwise work, compiled layers.

Nothing here knows recipes' tables, files or engines.
"""
