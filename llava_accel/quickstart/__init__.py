"""The tiny LLaVA that the quick start fine-tunes: its drawings, its making, and its trained weights."""
