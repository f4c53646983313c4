"""Short forms of `make chaos` and `make soak`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("s3")

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_whatever_happens_to_a_run_each_image_has_one_row_after_the_next() -> None:
    printed = run("tests.chaos", "--num-runs", "1", "--num-images", "160")
    assert re.search(r"\| driver killed \| 1 \| 1 \| 1 \|\n\n1 of 1", printed)


@pytest.mark.slow
def test_a_soak_verifies_its_store_and_its_second_run_opens_no_shard() -> None:
    printed = run("tests.soak", "--num-images", "10000")
    assert re.search(r"\| all \| 10,000 \|", printed)
    assert "0 requests for shards" in printed
    assert re.search(r"images of SOURCE │ +10,000 ", printed)
