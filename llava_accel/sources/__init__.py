"""Reads users' files as rows and image bytes: JSON, Parquet, Arrow, tar, the hub. Nothing here knows what a row means."""
