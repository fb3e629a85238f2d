"""Probes of the residual stream, and what ablating their directions does."""
