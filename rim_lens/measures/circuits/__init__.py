"""Circuits: which head or neuron writes to which, by which input, and whether what they make together is refusal."""
