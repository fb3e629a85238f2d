"""Prompt records, our own prompt sets, and loaders for users' files."""
