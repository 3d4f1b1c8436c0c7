"""The tiny LLaVA that the quick start fine-tunes: trained weights, tokenizer and processor. No code."""
