"""What a step really takes: time and memory, measured on the step that train.py takes."""
