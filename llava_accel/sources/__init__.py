"""Files as people have them, as rows and images' bytes: JSON, Parquet, Arrow, tar, the hub. Nothing of what a row means."""
