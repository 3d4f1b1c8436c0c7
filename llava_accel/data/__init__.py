"""The data's way: record -> conversation -> example -> row -> batch, one file a step."""
