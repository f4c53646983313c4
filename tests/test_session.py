"""Ray's start as a job sees it, in a process of its own; and what is said of an exception from a worker."""

import os
import subprocess
import sys

import pytest
from ray.cluster_utils import Cluster

from segray.errors import Reject, RunError
from segray.session import root_cause

PROGRAM = """
import signal
from segray.session import session

def ours(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, ours)
with session():
    assert signal.getsignal(signal.SIGTERM) is ours
"""


def test_a_job_still_hears_the_signal_that_ends_it_once_ray_has_started() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True, timeout=300)


def test_without_an_address_a_job_leaves_the_clusters_of_this_machine_alone() -> None:
    # Where a test before this one has started Ray in this process, the cluster asks for a token.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    program = "from segray.session import session\nwith session() as ray: print(ray.get_runtime_context().gcs_address)"
    kept = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH_")}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | kept
    try:
        for given, joins in (({}, False), ({"RAY_ADDRESS": cluster.address}, True)):
            printed = subprocess.check_output([sys.executable, "-c", program], env=environment | given, text=True)
            assert (printed.strip() == cluster.address) == joins
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (caused(RuntimeError("wrapped"), OSError(28, "No space left")), "OSError: [Errno 28] No space left"),
        (caused(RuntimeError("wrapped"), ValueError("first line\nsecond")), "ValueError: first line"),
        (caused(RuntimeError("wrapped"), caused(RunError("ours"), OSError("theirs"))), "ours"),
        (Reject("fetch", "missing", "x"), "fetch: missing: x"),
    ],
)
def test_the_root_cause_is_one_line_and_our_own_errors_speak_for_themselves(error: Exception, text: str) -> None:
    assert root_cause(error) == text
