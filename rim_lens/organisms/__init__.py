"""Models whose truth is known. Importing this room registers them with the loader."""

import rim_lens.organisms.planted
import rim_lens.organisms.smollm2
import rim_lens.organisms.toy  # noqa: F401 - each registers itself
from rim_lens.lens import load_model
from rim_lens.training import FineTuned, fine_tune

__all__ = ["FineTuned", "fine_tune", "load_model"]
