"""Neurons: which of them tell a request that is refused more from one that is refused less, and what their removal does."""
