"""A first recipe: what data, base and card say about the keys that depend on them. Nothing is trained or loaded."""
