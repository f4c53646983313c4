"""Preprocessing: what a model is fed of an image, and which bands of a scene that is."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from segray.errors import SettingsError

__all__ = ["Preprocessing", "match_bands"]

_RGB = ("red", "green", "blue")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """What happens to an image before the model sees it, in this order.

    Raises:
        SettingsError: a value is out of its bounds.
    """

    channels: Literal["RGB", "BGR", "L"] | tuple[str, ...] = "RGB"
    """Which channels, in which order; L is luma (ITU-R 601). Or the names of a scene's bands."""
    resize: int | None = None
    """Length in pixels to which the shorter side is brought (bilinear, antialiased). None: as it is, as of bands."""
    range: Literal[1, 255] = 1
    """What white is: samples lie in [0, range]. Of bands nothing: their values are taken as they are."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Subtracted from each channel; ImageNet's unless told."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Divides each channel after that."""

    def __post_init__(self) -> None:
        if self.bands is None and self.channels not in ("RGB", "BGR", "L"):
            raise SettingsError(
                f"preprocessing: channels {self.channels!r} must be 'RGB', 'BGR' or 'L', or the names of bands"
            )
        if self.bands is not None:
            self._check_bands(self.bands)
        num_channels = len(self.channels)
        if len(self.mean) != num_channels or len(self.std) != num_channels:
            raise SettingsError(
                f"preprocessing: {len(self.mean)} means and {len(self.std)} stds for {num_channels} channels"
            )
        numbers = (*self.mean, *self.std)
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise SettingsError(f"preprocessing: mean {self.mean} and std {self.std} must be finite numbers")
        if min(self.std) <= 0:
            raise SettingsError(f"preprocessing: std {self.std} must be positive")
        if self.range not in (1, 255):
            raise SettingsError(f"preprocessing: range {self.range} must be 1 or 255")
        if self.resize is not None and self.resize < 1:
            raise SettingsError(f"preprocessing: resize {self.resize} must be at least 1 pixel, or null")

    def _check_bands(self, bands: tuple[str, ...]) -> None:
        if not bands or not all(isinstance(name, str) and name for name in bands):
            raise SettingsError(f"preprocessing: channels {bands} must be names of bands, at least one")
        if len({name.casefold() for name in bands}) < len(bands):
            raise SettingsError(f"preprocessing: a band stands twice in {', '.join(bands)}; case makes no difference")
        if (self.range, self.resize) != (1, None):
            raise SettingsError(
                f"preprocessing: range {self.range} and resize {self.resize} are of images; "
                f"leave them out beside the bands {', '.join(bands)}"
            )

    @property
    def bands(self) -> tuple[str, ...] | None:
        """The names of the bands that the model sees. None: it sees images, as RGB, BGR or L."""
        return self.channels if isinstance(self.channels, tuple) else None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`.

        Raises:
            SettingsError: a field is unknown or out of its bounds.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - names):
            raise SettingsError(f"preprocessing: unknown fields {unknown}; there are {sorted(names)}")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        try:
            return cls(**values)
        except TypeError as error:
            raise SettingsError(f"preprocessing: a value of the wrong form in {dict(fields)}: {error}") from error


def match_bands(preprocessing: Preprocessing, names: Sequence[str]) -> tuple[str, ...]:
    """The bands of a scene that a model is fed, in the order in which `Predictor.predict_windows` takes them.

    Args:
        preprocessing: the model's.
        names: of the scene's bands; case makes no difference.

    Returns:
        Some of `names`: a model's own bands in its order; for RGB and BGR red, green and blue; for L the only band
        that there is, or red, green and blue.

    Raises:
        SettingsError: the scene lacks a band, or the model resizes the images that it sees.
    """
    if preprocessing.resize is not None:
        raise SettingsError(
            f"the model resizes images to {preprocessing.resize} pixels, and a window of a scene has no size of its "
            "own; take a model that does not (trained without --resize)"
        )
    if preprocessing.channels == "L" and len(names) == 1:
        return tuple(names)
    wanted = preprocessing.bands or _RGB
    there = {name.casefold(): name for name in names}
    if missing := [name for name in wanted if name.casefold() not in there]:
        raise SettingsError(
            f"the model sees the bands {', '.join(wanted)}, and the scene has {', '.join(names) or 'none'}: "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; say what the scene calls each: "
            f"--scenes.bands {missing[0]}={names[0] if names else '…'}"
        )
    return tuple(there[name.casefold()] for name in wanted)
