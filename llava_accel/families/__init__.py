"""What is particular to each family of LLaVA: classes, config keys, tiles, and the terms of its original code."""
