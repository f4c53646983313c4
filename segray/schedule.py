"""How a model is optimised: by what, and at which rate in which step."""

import math
from dataclasses import dataclass
from typing import Literal

from segray.errors import SettingsError

__all__ = ["Optimization", "rate"]

_POLY_POWER = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimization:
    """The optimiser, its rates, and what happens to gradients and weights.

    Raises:
        SettingsError: a setting is out of its bounds.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum."""
    learning_rate: float = 1e-3
    """The largest: reached after the warm-up, from where it falls to nothing."""
    backbone_rate: float = 1.0
    """Factor of it for the encoder (backbone); 0 freezes that with its batch norms."""
    schedule: Literal["cosine", "poly"] = "cosine"
    """How it falls: along a cosine, or as (1 - step/steps)^0.9."""
    warm_up: float = 0.05
    """Share of the steps in which it rises along a line."""
    weight_decay: float = 0.01
    """Of the optimiser; biases and norms have none."""
    momentum: float = 0.9
    """SGD's."""
    clip: float | None = None
    """Largest norm of the gradient; a longer one is shortened. None: as it is."""
    accumulate: int = 1
    """In how many parts a batch goes through the model, one after the other, to save memory."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, which is then what is validated and written."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise SettingsError(f"--learning-rate {self.learning_rate} must be above 0 and finite")
        for name, value in (("backbone-rate", self.backbone_rate), ("weight-decay", self.weight_decay)):
            if not 0 <= value < math.inf:
                raise SettingsError(f"--{name} {value} must be at least 0 and finite")
        for name, value in (("warm-up", self.warm_up), ("momentum", self.momentum), ("ema", self.ema or 0.0)):
            if not 0 <= value < 1:
                raise SettingsError(f"--{name} {value} must be at least 0 and below 1")
        if self.clip is not None and not self.clip > 0:
            raise SettingsError(f"--clip {self.clip} must be above 0")
        if self.accumulate < 1:
            raise SettingsError(f"--accumulate {self.accumulate} must be at least 1")


def rate(settings: Optimization, step: int, num_steps: int) -> float:
    """The share of the full learning rate in a step (from 0 on) of so many: a line up, then the schedule down."""
    num_rising = round(settings.warm_up * num_steps)
    if step < num_rising:
        return (step + 1) / num_rising
    progress = (step - num_rising) / (num_steps - num_rising)
    return 0.5 * (1 + math.cos(math.pi * progress)) if settings.schedule == "cosine" else (1 - progress) ** _POLY_POWER
