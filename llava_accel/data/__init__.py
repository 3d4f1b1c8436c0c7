"""From files to batches: records, conversations, examples, rows, order. No model and no accelerator."""
