"""The command line: the same jobs as `jobs/*.py`, from the same definitions."""

import importlib
import signal
import sys
from typing import Any, NoReturn

import tyro

from segray.errors import SegrayError
from segray.progress import say

__all__ = ["main"]

JOBS = {
    "label": "label images into a label store",
    "report": "draw one page of what a run did",
    "evaluate": "compare a label store with targets",
    "compact": "merge the small parts of a label store",
    "verify": "read a label store back and prove that it is whole",
    "export": "write labelled scenes as rasters, polygons and STAC items",
    "pack": "pack images and targets into shards",
    "train": "train a model on shards of image/target pairs",
}


def main(job: str | None = None) -> NoReturn:
    """Runs a job with the arguments of this process, and exits.

    Args:
        job: the job's name. None: the first argument names it.
    """
    program, arguments = f"jobs/{job}.py", sys.argv[1:]
    if job is None:
        if not arguments or arguments[0] not in JOBS:
            listing = "\n".join(f"  {name:<10}{purpose}" for name, purpose in JOBS.items())
            asked_for_help = not arguments or arguments[0] in ("-h", "--help")
            text = f"usage: segray JOB [-h] …\n\n{listing}\n\nsegray JOB --help tells the rest."
            print(text, file=sys.stdout if asked_for_help else sys.stderr)
            sys.exit(0 if asked_for_help else 2)
        job, *arguments = arguments
        program = f"segray {job}"
    module = importlib.import_module(f"segray.{job}")
    signal.signal(signal.SIGTERM, _interrupt)  # `ray job stop` asks like this
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background has it ignored
    try:
        settings = tyro.cli(getattr(module, job.capitalize()), prog=program, args=arguments)
        getattr(module, job)(settings)
    except SegrayError as error:
        say(f"segray: {error}", exit_status=error.exit_status)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        say("segray: stopped", exit_status=130)
        sys.exit(130)
    sys.exit(0)


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt
