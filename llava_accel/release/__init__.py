"""What leaves a run: exports in three forms, their verification, the hub. No training."""
