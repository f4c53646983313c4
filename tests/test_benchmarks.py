import csv
from pathlib import Path

import pytest
import torchvision

from tests.benchmarks import roofline, throughput
from tests.benchmarks.throughput import Timed

SECOND_HEAD = 65 * 65 * (1024 * 256 * 9 + 256 * 21) / 1e9  # which only training needs


@pytest.mark.parametrize(("name", "without"), [("lraspp_mobilenet_v3_large", 0), ("deeplabv3_resnet50", SECOND_HEAD)])
def test_the_floor_counts_the_flops_that_torchvision_publishes(name: str, without: float) -> None:
    convolutions = roofline.convolutions(name, 520, 520)
    published = torchvision.models.get_model_weights(name).DEFAULT.meta["_ops"]  # 10⁹ products with their sums
    assert sum(one.num_flops for one in convolutions) / 2e9 == pytest.approx(published - without, rel=0.002)


def test_a_convolution_takes_the_longer_of_its_flops_and_its_bytes() -> None:
    ceilings = roofline.Ceilings(flops_per_second=1e9, bytes_per_second=1e9)
    computes = roofline.Convolution(num_flops=3_000_000, num_values=10)
    moves = roofline.Convolution(num_flops=10, num_values=1_000_000)
    assert roofline.floor_milliseconds([computes, moves], ceilings, "float32") == pytest.approx(3 + 4)
    assert roofline.floor_milliseconds([computes, moves], ceilings, "bfloat16") == pytest.approx(3 + 2)


def test_a_ratio_is_to_the_loops_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loops = iter([(Timed(images_per_second=10.0 * rate), Timed(images_per_second=20.0 * rate)) for rate in (1, 2, 4)])
    monkeypatch.setattr(throughput.Suite, "_loops", lambda self: next(loops))
    monkeypatch.setattr(throughput, "OUT", tmp_path)
    suite = throughput.Suite.__new__(throughput.Suite)
    suite._dtype, suite._bare, suite._timed = "float32", [], []
    for name, rate in (("slow", 15.0), ("fast", 60.0)):
        suite.run(name, lambda rate=rate: Timed(images_per_second=rate, around=(1.0, 2.0)))  # type: ignore[misc]
    throughput.write("some", {"date": "2026-11-23"}, {"ways": suite.rows()})
    with open(tmp_path / "some-ways.csv", newline="") as file:
        rows = {row["way"]: row for row in csv.DictReader(file)}
    assert (rows["slow"]["of the eager loop"], rows["slow"]["of the fast loop"]) == ("1.00", "0.50")
    assert (rows["fast"]["of the eager loop"], rows["fast"]["of the fast loop"]) == ("2.00", "1.00")
    assert float(rows["bare eager loop"]["images/s"]) == pytest.approx(70 / 3, abs=0.1)
    assert "| slow | float32 | 15.0 | 1.00 | 0.50 | 1.0 | 2.0 |" in (tmp_path / "some.md").read_text()
