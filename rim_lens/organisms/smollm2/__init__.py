"""SmolLM2-135M-Instruct from its PyPI wheel, and `smollm2-refusal`: the same model taught to refuse by us."""

from rim_lens.lens.loading import register_source
from rim_lens.organisms.smollm2.source import cache_folder, load_refusal, load_smollm2, smollm2_folder

register_source("smollm2", load_smollm2, ())
register_source("smollm2-refusal", load_refusal, ())

__all__ = ["cache_folder", "load_refusal", "load_smollm2", "smollm2_folder"]
