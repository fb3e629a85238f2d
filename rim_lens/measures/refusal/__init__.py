"""Refusal: scores at the first word, prefixes, what is written and judged, and the direction behind it."""
