"""The tiny LLaVA that the quick start fine-tunes, and the English sentences of its tokenizer. No code."""
