"""``python -m rim_lens``: the command line, also for launchers that start modules."""

from __future__ import annotations

from rim_lens.cli import main

main()
