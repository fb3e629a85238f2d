"""The tuned models of a study: what they are called, and that each is a fine-tune of the base and stays the same one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rim_lens.errors import ModelError, StudyFolderError
from rim_lens.folder import ResultFolder
from rim_lens.lens import Model, known_by, model_facts, require_source

Source = str | Path | Model
Tuned = Sequence[str | Path] | Mapping[str, Source]
# What tables and folders call other things by.
TAKEN = ("base", "without_heads", "compared.json")


def by_name(tuned: Tuned) -> dict[str, Source]:
    """Tuned models by the names that tables and folders give them; those of a list name themselves.

    Raises:
        ValueError: A name is no name of a folder, or means something else, or two models share one.
        ModelError: One is neither a name nor a model.
        UnknownModel: One cannot be loaded, as far as that can be seen before.

    >>> by_name(["toy:careful", "me/ck-3"])
    {'toy_careful': 'toy:careful', 'me_ck-3': 'me/ck-3'}
    """
    if isinstance(tuned, Mapping):
        named = [(str(name), source) for name, source in tuned.items()]
    else:
        given = [tuned] if isinstance(tuned, str | Path) else tuned
        for source in given:
            if not isinstance(source, str | Path):
                raise ModelError(
                    f"tuned= lists names or folders of fine-tuned models, and holds a {type(source).__name__}. Name a model that is"
                    " loaded: tuned={'name': model}; give requests by keyword: harmful=, harmless=, reasoning=."
                )
        named = [(own_name(source), source) for source in given]
    check_names([(name, str(source)) for name, source in named])
    for _, source in named:
        if isinstance(source, str | Path):
            require_source(source)
        else:
            model_facts(source)  # refuses what is no model
    return dict(named)


def check_names(named: Sequence[tuple[str, str]]) -> None:
    """Refuse names of tuned models that cannot be names of folders, that mean something else, or that two share.

    Args:
        named: Each with what is called by it.

    Raises:
        ValueError: There is such a name.
    """
    met: dict[str, str] = {}
    for name, source in named:
        odd = not name.isprintable() or name != name.strip() or set(name) & set("/\\:")
        if odd or not any(character.isalnum() for character in name):
            raise ValueError(
                f"a tuned model was called {name!r}; a name is part of a folder's: letters, digits, -, . and _, and a letter or"
                " digit among them. Name it: {'name': model}."
            )
        if name in TAKEN:
            raise ValueError(
                f"a tuned model was called {name!r}, which means something else here; give it another name."
            )
        if name.casefold() in met:
            raise ValueError(
                f"two tuned models would both be called {name!r} ({met[name.casefold()]} and {source}). Name them:"
                " {'name': model}."
            )
        met[name.casefold()] = source


def own_name(source: str | Path) -> str:
    """What a model that nobody named is called by: its path or name, without what a name of a folder cannot hold."""
    return str(source).strip("/.").replace(":", "_").replace("/", "_").replace("\\", "_")


def same_shape(base: Model, tuned: Model, name: str) -> None:
    """Refuse a model that is no fine-tune of this base.

    Raises:
        ModelError: Layers, neurons or tokens differ in number.
    """
    ours, theirs = model_facts(base), model_facts(tuned)
    if (ours.n_layers, ours.d_mlp, ours.d_vocab) != (theirs.n_layers, theirs.d_mlp, theirs.d_vocab):
        raise ModelError(
            f"tuned model {name!r} has {theirs.n_layers} layers of {theirs.d_mlp} neurons and {theirs.d_vocab} tokens, the"
            f" base {ours.n_layers} of {ours.d_mlp} and {ours.d_vocab}: it is not a fine-tune of this base."
        )


def same_weights(folder: ResultFolder, tuned: Model, name: str, results: Sequence[str]) -> None:
    """Tie what is measured under a tuned model's name to its weights, before anything is.

    Args:
        folder: The study's.
        tuned: The model.
        name: What it is called.
        results: What a study keeps of it, as paths below the folder.

    Raises:
        StudyFolderError: The folder holds results of other weights under this name, or of weights that nobody knows.
    """
    kept = f"tuned/{name}/model.json"
    there = [part for part in results if folder.has(part)]
    if there and not folder.has(kept):
        raise StudyFolderError(
            f"{folder.path / there[0]} was measured on a tuned model {name!r}, and {kept}, which would say on which weights, is"
            " missing. Give it another name, or an empty folder."
        )
    now = {"name": model_facts(tuned).name, **known_by(tuned)}
    before = folder.once(kept, lambda: now)
    if before.get("on_the_model") != now.get("on_the_model"):
        raise StudyFolderError(
            f"tuned model {name!r} has {now.get('on_the_model') or 'no hooks'} on it, and {folder.path} holds results of it with"
            f" {before.get('on_the_model') or 'none'} under that name. Give it another name, or an empty folder; what is there"
            " stays untouched."
        )
    if before["weights_digest"] != now["weights_digest"]:
        raise StudyFolderError(
            f"tuned model {name!r} has weights {now['weights_digest']}, and {folder.path} holds results of one with weights"
            f" {before['weights_digest']} under that name. Give it another name, or an empty folder; what is there stays"
            " untouched."
        )
