"""Heads: where they look, what their removal does, and which of them carry refusal."""
