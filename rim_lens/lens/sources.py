"""What a model is given by: a name, a folder, or itself; and telling without loading it whether it is still the same one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rim_lens.errors import UnknownModel
from rim_lens.lens.adapters import CONFIG as ADAPTER
from rim_lens.lens.digest import weights_digest
from rim_lens.lens.facts import Model
from rim_lens.lens.loading import known_sources, variants_of

CONFIG = "config.json"
_WEIGHTS = (".safetensors", ".bin")


def require_source(source: str | Path) -> None:
    """Refuse a name or folder that `load_model` cannot take, as far as that can be seen without loading or asking a hub.

    Raises:
        UnknownModel: A variant that does not exist, no such folder, or a folder without a model or adapter.

    >>> import rim_lens.organisms  # registers its models
    >>> require_source("toy:carefull")
    Traceback (most recent call last):
    ...
    rim_lens.errors.UnknownModel: model 'toy:carefull' was asked for; 'toy' has the variants Z, C, careful, confirm, deviate.
    """
    base, _, variant = str(source).partition(":")
    if base in known_sources():
        variants = variants_of(base)
        if variants is not None and variant not in ("", *variants):
            there = f"the variants {', '.join(variants)}" if variants else "no variants"
            raise UnknownModel(f"model {str(source)!r} was asked for; {base!r} has {there}.")
    elif Path(source).is_dir():
        if not any((Path(source) / name).is_file() for name in (CONFIG, ADAPTER)):
            raise UnknownModel(
                f"{source} is a folder, but not one with a model or an adapter: it has neither {CONFIG} nor {ADAPTER}."
            )
    elif is_path(source):
        raise UnknownModel(
            f"there is no folder {str(source)!r}. Give one with a model or an adapter, or a name that load_model knows."
        )


def is_path(source: str | Path) -> bool:
    """Whether it can be nothing but a folder: a hub name has one slash at most.

    >>> is_path("runs/a/step-4"), is_path("Qwen/Qwen3-4B"), is_path("toy:careful")
    (True, False, False)
    """
    text = str(source)
    known = text.partition(":")[0] in known_sources()
    return not known and (isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1)


def same_source(one: str | Path, other: str | Path) -> bool:
    """Whether two names mean one model: the same words, or the same folder."""
    return str(one) == str(other) or (Path(one).exists() and Path(one).resolve() == Path(other).resolve())


def source_digest(source: str | Path | Model) -> str | None:
    """Tell a model apart from others without loading it: of a folder, its weight files and configuration; of a model, its weights.

    A folder's digest stays when it is moved, and is no `weights_digest`.

    Returns:
        16 hexadecimal digits; None of a name, which says itself what it is.
    """
    if not isinstance(source, str | Path):
        return weights_digest(source)
    folder = Path(source)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name == ADAPTER:
            digest.update(json.dumps(_without_base(path), sort_keys=True).encode())
        elif path.suffix in _WEIGHTS or path.name == CONFIG:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _without_base(path: Path) -> Any:
    """An adapter's configuration without where its base lies, which may move."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return {name: value for name, value in told.items() if name != "base_model_name_or_path"}
    except (OSError, ValueError, AttributeError):
        return None  # loading it says what is wrong
