"""The small trainer that organisms and fine-tuning studies share."""

from rim_lens.training.fine_tuning import FineTuned, fine_tune
from rim_lens.training.loop import TrainConfig
from rim_lens.training.lora import LoRA
from rim_lens.training.rows import Drawn, Row, maths_rows

__all__ = ["Drawn", "FineTuned", "LoRA", "Row", "TrainConfig", "fine_tune", "maths_rows"]
