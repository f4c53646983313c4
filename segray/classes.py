"""Classes: what the ids in a label map stand for, and how they are drawn."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Self

import fsspec

from segray.errors import SettingsError

__all__ = ["RGB", "Classes"]

RGB = tuple[int, int, int]


def _voc_colour(class_id: int) -> RGB:
    """Pascal VOC's colour of a class: the id's bits, dealt to red, green and blue from the top."""
    red = green = blue = 0
    for shift in range(8):
        red |= (class_id >> (3 * shift) & 1) << (7 - shift)
        green |= (class_id >> (3 * shift + 1) & 1) << (7 - shift)
        blue |= (class_id >> (3 * shift + 2) & 1) << (7 - shift)
    return red, green, blue


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of a model, in the order of their ids.

    Raises:
        SettingsError: no names, a name twice, or a palette that does not fit.
    """

    names: tuple[str, ...]
    """One name for each class; its index is the class_id."""

    palette: tuple[RGB, ...] = ()
    """One colour for each class, 0 to 255 a channel. Empty: Pascal VOC's colours."""

    ignore_index: int = 255
    """The id of void pixels in targets: outside loss and metrics."""

    def __post_init__(self) -> None:
        if not self.names:
            raise SettingsError("classes: there are no names; at least one is needed")
        if len(set(self.names)) < len(self.names):
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            raise SettingsError(f"classes: names are given twice: {', '.join(twice)}")
        if not self.palette:
            palette = tuple(_voc_colour(class_id) for class_id in range(len(self.names)))
            object.__setattr__(self, "palette", palette)
        if len(self.palette) != len(self.names):
            raise SettingsError(
                f"classes: {len(self.palette)} colours for {len(self.names)} names; give one each, or none"
            )
        for colour in self.palette:
            if len(colour) != 3 or not all(isinstance(c, int) and 0 <= c <= 255 for c in colour):
                raise SettingsError(f"classes: the colour {colour} is not three integers from 0 to 255")
        if 0 <= self.ignore_index < len(self.names):
            raise SettingsError(
                f"classes: ignore_index {self.ignore_index} is the id of the class "
                f"{self.names[self.ignore_index]!r}; choose one that no class has"
            )

    def __len__(self) -> int:
        return len(self.names)

    def to_dict(self) -> dict[str, Any]:
        """The form in which checkpoints, recipes and classes files hold classes."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            SettingsError: a field is missing, unknown or of the wrong form.
        """
        try:
            names = fields["names"]
            if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
                raise TypeError(f"names {names!r} is not a list of texts")
            return cls(
                names=tuple(names),
                palette=tuple((int(r), int(g), int(b)) for r, g, b in fields.get("palette", ())),
                ignore_index=int(fields.get("ignore_index", 255)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SettingsError(
                f'classes: {error!r}; expected {{"names": [...], "palette": [[r, g, b], ...], "ignore_index": 255}}'
            ) from error

    @classmethod
    def read(cls, uri: str) -> Self:
        """Reads a classes file: JSON as `to_dict` gives it, a JSON list of names, or a name a line.

        Raises:
            SettingsError: there is no such file, or it is none of these.
        """
        try:
            with fsspec.open(uri, "rt", encoding="utf-8-sig") as file:
                text = file.read()
        except Exception as error:  # whatever the store's client raises, or not UTF-8
            raise SettingsError(f"{uri}: the classes file cannot be read: {type(error).__name__}: {error}") from error
        if text.lstrip().startswith(("{", "[")):
            try:
                fields = json.loads(text)
            except json.JSONDecodeError as error:
                raise SettingsError(f"{uri}: not valid JSON: {error}") from error
            return cls.from_dict(fields if isinstance(fields, dict) else {"names": fields})
        return cls(tuple(line.strip() for line in text.splitlines() if line.strip()))
