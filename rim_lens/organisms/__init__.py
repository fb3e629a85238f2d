"""Models whose truth is known. Importing this room registers them with the loader."""

import rim_lens.organisms.planted
import rim_lens.organisms.smollm2
import rim_lens.organisms.toy  # noqa: F401 - each registers itself
from rim_lens.lens import load_model

__all__ = ["load_model"]
