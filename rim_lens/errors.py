"""The exceptions that rim_lens raises on purpose.

Each message says what was asked, what was found, and what to do. All derive from `RimLensError`; those
that are also a kind of a built-in error derive from that as well, so that ``except IndexError`` works. Only a setting that
no such call takes (an unknown word for `method`, no checkpoint at all) is mostly a plain ValueError, with a message of that kind.
"""

from __future__ import annotations

from typing import Any


class RimLensError(Exception):
    """Base of all errors that rim_lens raises on purpose."""


# --- prompts -----------------------------------------------------------------------------------------


class PromptFileError(RimLensError, ValueError):
    """A prompt file is missing, corrupt, or lacks a column."""


class UnknownPromptSet(RimLensError, KeyError):
    """No prompt set, language or split bears that name."""

    __str__ = Exception.__str__  # KeyError would print the message in quotes


class MissingTwin(RimLensError, ValueError):
    """A record names a twin that is not at hand."""


class MissingIntent(RimLensError, ValueError):
    """A record has no sentence of intent, so that no counterfactual pair can be made of it."""


class CotError(RimLensError, ValueError):
    """No chain of thought of that kind or token length can be written for a request."""


# --- chat --------------------------------------------------------------------------------------------


class UnknownChatFormat(RimLensError, ValueError):
    """No registered chat format fits this tokenizer."""


class DuplicateChatFormat(RimLensError, ValueError):
    """A chat format of that name is registered already."""


class TemplateMismatch(RimLensError, ValueError):
    """The tokenizer's own chat template renders otherwise than the chat format found for it."""


class MissingTokenizer(RimLensError, ValueError):
    """The model has no tokenizer."""


class MissingPadToken(RimLensError, ValueError):
    """Prompts of unequal length need a pad token and the tokenizer has none."""


class SpanError(RimLensError, ValueError):
    """Spans cannot be located exactly (shared token, text that decodes to something else, overlap)."""


class UnknownSpan(RimLensError, KeyError):
    """No span bears that name."""

    __str__ = Exception.__str__


class EmptySpan(RimLensError, ValueError):
    """A span has no token in at least one prompt, so that a mass or pool over it means nothing."""


class ConditionError(RimLensError, ValueError):
    """The think condition does not fit what was asked (for instance refusal at an open think block)."""


# --- lens --------------------------------------------------------------------------------------------


class ModelError(RimLensError, RuntimeError):
    """The model cannot be used as asked."""


class UnknownModel(ModelError, ValueError):
    """No loader knows that model name."""


class CorruptWeights(ModelError):
    """Shipped weights are missing, or are not the ones that shipped."""


class AdapterMismatch(ModelError, ValueError):
    """An adapter does not fit the model it is to be folded into."""


class MissingExtra(RimLensError, ImportError):
    """A package of an optional extra (``pip install "rim-lens[...]"``) is not installed."""


class UnsupportedModel(ModelError):
    """The architecture lacks what was asked for (per-neuron work on a mixture of experts, a missing hook)."""


class TrainingMode(ModelError):
    """The model is in training mode, so that dropout would enter every number."""


class HookDidNotFire(ModelError):
    """A hook exists by name but never fires in a forward pass."""


class WrongHookShape(ModelError):
    """A hook fires with a tensor of another shape or content than its name promises."""


class EditHadNoEffect(ModelError):
    """Overwriting a whole layer at a hook left the logits as they were: edits there are dead."""


class ImpossibleEdit(RimLensError, ValueError):
    """An edit cannot be done as asked: a row with nothing left to attend to, a mass above 1, a zero direction."""


class NotFinite(ModelError, ValueError):
    """NaN or infinity where a finite number is needed."""


class UnknownHead(RimLensError, IndexError):
    """A (layer, head) that the model does not have."""


class UnknownNeuron(RimLensError, IndexError):
    """A (layer, neuron) that the model does not have."""


class UnknownLayer(RimLensError, IndexError):
    """A layer that the model does not have."""


# --- capture, generation, measures, study ------------------------------------------------------------


class CaptureError(RimLensError, ValueError):
    """A capture was asked for something that cannot be labelled or stored."""


class ReferenceMismatch(RimLensError, ValueError):
    """A reference set was taken from another model, or its shapes do not fit."""


class NotEnoughData(RimLensError, ValueError):
    """Too few requests, families or controls for the statistic asked for."""


class StatisticsError(RimLensError, ValueError):
    """A statistic was asked of numbers that cannot carry it (lengths that differ, a level outside 0 to 1)."""


class AnswerError(RimLensError, ValueError):
    """A reasoning question has no checked answer, or one that cannot be compared with what was written."""


class JudgeUnavailable(RimLensError, ConnectionError):
    """A judge's endpoint does not answer, or not as such an endpoint does.

    Attributes:
        judged: The table of what was judged before, where `judge_all` raised it; else None.
    """

    def __init__(self, message: str, judged: Any = None) -> None:
        super().__init__(message)
        self.judged = judged


class NoDirection(RimLensError):
    """No direction of those tried does what was asked within the bounds."""


class GateNotPassed(RimLensError):
    """The model does not show what the study is about; measuring on would mislead."""


class StudyFolderError(RimLensError, ValueError):
    """A study folder is corrupt, or holds another study."""


class SharingError(RimLensError, RuntimeError):
    """Processes that share their work lost each other, or do not do the same."""


# --- views -------------------------------------------------------------------------------------------


class ViewTooLarge(RimLensError, ValueError):
    """A page would be larger, or slower to draw, than a browser can take."""
