"""Entanglement: what training moved on reasoning, held against what it moved on safety, in two models."""
