"""A Ray cluster to run on, with Ray's own voice turned down."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from segray.errors import Refused, SegrayError

__all__ = ["nodes_with_cpus", "root_cause", "session"]


@contextmanager
def session() -> Iterator[ModuleType]:
    """Ray, connected: to a cluster that is there already, the one that RAY_ADDRESS names, or one in this process.

    Yields:
        The module `ray`. What was started here is stopped again.

    Raises:
        Refused: the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # native code would write on the terminal
    # Ray ends idle workers after a second, and to start others takes longer than what they do.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
    # There is no dashboard here, and yet Ray would wait two seconds for the process that is without it.
    os.environ.setdefault("RAY_DASHBOARD_STARTUP_TIMEOUT_S", "0")
    import ray

    ours = not ray.is_initialized()
    if ours:
        # Left alone, Ray would take any cluster that it finds on this machine, whoever's it is.
        local: dict[str, Any] = (
            {} if os.environ.get("RAY_ADDRESS") else {"address": "local", "include_dashboard": False}
        )
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            with _muted_stderr():
                ray.init(logging_level=logging.ERROR, log_to_driver=False, **local)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = os.environ.get("RAY_ADDRESS")
            place = f"the Ray cluster at {where} (RAY_ADDRESS) cannot be reached" if where else "Ray cannot start here"
            raise Refused(f"{place}: {str(error).partition(chr(10))[0]}") from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own would end the process at once
    # Only now, as workers start meanwhile.
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # a wrapping of Ray's would lose it on the way here
    for name in ("ray.data", "ray.train"):  # what fails is told by the job, in one line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def nodes_with_cpus(ray: ModuleType, wait_seconds: float, say: Callable[[str], None]) -> Sequence[Mapping[str, Any]]:
    """The cluster's nodes, once one that is alive has CPUs, or as they are after `wait_seconds`."""
    deadline, told = time.monotonic() + wait_seconds, False
    while True:
        nodes: Sequence[Mapping[str, Any]] = ray.nodes()
        if any(node["Alive"] and node["Resources"].get("CPU") for node in nodes) or time.monotonic() >= deadline:
            return nodes
        if not told:
            say("the cluster has no CPUs; waiting for a node")
            told = True
        time.sleep(1)


def root_cause(error: BaseException) -> str:
    """The first line of what lies under Ray's wrappings of a worker's exception."""
    # Ray's own have `cause`, and may be of the class of what they wrap, too.
    while cause := getattr(error, "cause", None) or (None if isinstance(error, SegrayError) else error.__cause__):
        error = cause
    text = str(error) if isinstance(error, SegrayError) else f"{type(error).__name__}: {error}"
    return text.strip().splitlines()[0][:500]


@contextmanager
def _muted_stderr() -> Iterator[None]:
    """Drops what native code writes to the process's standard error."""
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
