"""What train.py calls in each step: the step itself, optimizer, meter, guards, validation, the end of a run."""
