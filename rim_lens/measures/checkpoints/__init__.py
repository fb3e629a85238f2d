"""Runs of checkpoints: refusal, accuracy, drift and entanglement on the way, and what can be said of them."""
