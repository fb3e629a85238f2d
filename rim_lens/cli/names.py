"""Names that are completed on the command line, written out: a shell asks at every key, and must not wait for torch."""

MODELS = (
    "toy",
    "toy:C",
    "toy:careful",
    "toy:confirm",
    "toy:deviate",
    "planted",
    "smollm2",
    "smollm2-refusal",
)
CONDITIONS = ("off", "open", "careful", "confirm", "deviate", "heuristic", "filler", "unrelated")
TRAINED = ("careful", "confirm", "deviate", "heuristic")
