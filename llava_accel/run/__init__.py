"""What a run needs besides model and data: backend, accumulation, optimizer, checkpoints, meter, evaluation."""
