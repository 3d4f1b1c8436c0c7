"""Files that are whole or not there: atomic writes, manifests, JSON lines. Nothing here knows what the files mean."""
