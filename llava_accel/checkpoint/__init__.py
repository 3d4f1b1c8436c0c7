"""Checkpoints of a run: what they hold, how a run goes on from them. No other form of the weights."""
