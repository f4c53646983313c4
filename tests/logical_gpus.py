"""The label job on GPUs that are there in name only: its models go where GPUs are, and compute on the CPU.

python tests/logical_gpus.py SOURCE SINK --model MODEL
"""

import dataclasses

from segray import label
from segray.cli import main

_place = label.place


def _on_cpu(*arguments: object) -> label.Placement:
    return dataclasses.replace(_place(*arguments), device="cpu")  # type: ignore[arg-type]


if __name__ == "__main__":
    label.place = _on_cpu  # type: ignore[assignment]
    main("label")
