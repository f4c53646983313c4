"""What can go wrong, as one small tree.

SegrayError            one line for a person, then the exit status
├── Refused            nothing was started                             exit 2
│   ├── SettingsError  a setting is out of its bounds
│   ├── SourceError    the source cannot be read or holds no image
│   ├── SinkError      the sink cannot be read or written
│   ├── ModelError     weights cannot be had or do not fit
│   └── Locked         another run holds the sink's lock               exit 3
├── RunError           the run ended badly; what it committed is kept  exit 1
└── Reject             one image cannot be labelled; it becomes a row of `rejects`
"""

import contextlib
from collections.abc import Iterator

__all__ = [
    "Locked",
    "ModelError",
    "Refused",
    "Reject",
    "RunError",
    "SegrayError",
    "SettingsError",
    "SinkError",
    "SourceError",
    "extra",
]


class SegrayError(Exception):
    """An expected failure: its text is one line that names the way out."""

    exit_status = 1


class Refused(SegrayError):
    """The job was not started."""

    exit_status = 2


class SettingsError(Refused):
    """A setting is out of its bounds, or two of them contradict each other."""


class SourceError(Refused):
    """The source cannot be read, or there is no image in it."""


class SinkError(Refused):
    """The sink cannot be read or written."""


class ModelError(Refused):
    """The model is not known, or its weights cannot be had or do not fit."""


class Locked(Refused):
    """Another run holds the sink's lock."""

    exit_status = 3


class RunError(SegrayError):
    """The run ended badly; everything that it committed is kept."""


class Reject(SegrayError):
    """One image cannot be labelled.

    Attributes:
        stage: the step that gave up: `fetch`, `decode` or `predict`.
        kind: what is wrong, in words that many images share (rejects are counted by it).
        detail: what is wrong with this image.
    """

    def __init__(self, stage: str, kind: str, detail: str) -> None:
        """Takes what the attributes hold."""
        super().__init__(stage, kind, detail)
        self.stage = stage
        self.kind = kind
        self.detail = detail

    @property
    def reason(self) -> str:
        """`kind: detail`, as the reject's row holds it."""
        return f"{self.kind}: {self.detail}"

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}"


@contextlib.contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """What is imported within comes with an extra of segray's.

    Args:
        name: the extra's.
        what: needs it.

    Raises:
        SettingsError: it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"{what} needs {error.name}, which is not installed; pip install 'segray[{name}]'"
        ) from error
