"""The model and its weights: bases, layouts, adapters, the objective. No run, no ranks, no files of a run."""
