"""What is particular to each family of LLaVA: classes, config keys, tiles, and how its own code says it."""
