"""Models whose truth is known. Importing this room registers them with the loader."""

from rim_lens.lens import load_model

__all__ = ["load_model"]
