import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from torchmetrics.classification import MulticlassJaccardIndex

from segray.classes import Classes
from segray.errors import RunError, SettingsError, SinkError, SourceError
from segray.evaluate import Evaluate, evaluate
from tests.label_store import Image, windows, write_store
from tests.rasters import TRANSFORM, write_raster

CLASSES = Classes(("soil", "crop", "weed", "track"))
SHAPE = (24, 32)


def random_pairs(num_images: int, num_classes: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Targets, with void, and predictions that are right for seven pixels in ten."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(num_images):
        target = rng.integers(0, num_classes, SHAPE).astype(np.uint8)
        guess = rng.integers(0, num_classes, SHAPE)
        prediction = np.where(rng.random(SHAPE) < 0.7, target, guess).astype(np.uint8)
        target[rng.random(SHAPE) < 0.05] = 255
        pairs.append((target, prediction))
    return pairs


def write_target(path: Path, target: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = PillowImage.fromarray(target)
    if palette:
        image.putpalette(bytes(range(256)) * 3)
    image.save(path)


def job(tmp_path: Path, **options: object) -> Evaluate:
    return Evaluate(sink=str(tmp_path / "sink"), targets=str(tmp_path / "targets"), **options)  # type: ignore[arg-type]


def test_agrees_with_torchmetrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = random_pairs(11, 4)
    images = [Image(uri=f"file:///photos/{i}.jpg", label_map=prediction) for i, (_, prediction) in enumerate(pairs)]
    write_store(tmp_path / "sink", images, CLASSES)
    each = MulticlassJaccardIndex(num_classes=4, average=None, ignore_index=255)
    mean = MulticlassJaccardIndex(num_classes=4, ignore_index=255)
    for i, (target, prediction) in enumerate(pairs):
        write_target(tmp_path / "targets" / f"sub{i % 2}" / f"{i}.png", target, palette=i % 3 == 0)
        for metric in (each, mean):
            metric.update(torch.from_numpy(prediction.astype(int)), torch.from_numpy(target.astype(int)))

    evaluation = evaluate(job(tmp_path, json=str(tmp_path / "out" / "scores.json")))

    assert evaluation.num_images == 11
    np.testing.assert_allclose(evaluation.confusion_matrix.iou(), each.compute().numpy(), rtol=1e-6)
    assert evaluation.confusion_matrix.miou() == pytest.approx(float(mean.compute()), rel=1e-6)
    written = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert written == evaluation.to_dict()
    valid = [(target[target != 255], prediction[target != 255]) for target, prediction in pairs]
    assert written["num_pixels"] == sum(target.size for target, _ in valid)
    right = sum(int((target == prediction).sum()) for target, prediction in valid)
    assert written["pixel_accuracy"] == pytest.approx(right / written["num_pixels"])
    assert [row["num_target_pixels"] for row in written["classes"]] == np.sum(
        [np.bincount(target, minlength=4) for target, _ in valid], axis=0
    ).tolist()
    printed = capsys.readouterr().out
    assert f"mIoU {written['miou']:.4f}" in printed
    assert "20261122T080301Z-1a2b3c4d, the newest" in printed


def test_the_order_of_parts_changes_nothing(tmp_path: Path) -> None:
    pairs = random_pairs(7, 4)
    images = [Image(uri=f"file:///p/{i}.jpg", label_map=prediction) for i, (_, prediction) in enumerate(pairs)]
    results = []
    for i, order in enumerate(itertools.islice(itertools.permutations(images), 0, 5040, 1700)):
        folder = tmp_path / str(i)
        write_store(folder / "sink", order, CLASSES, per_part=i + 1)
        for j, (target, _) in enumerate(pairs):
            write_target(folder / "targets" / f"{j}.png", target)
        results.append(evaluate(job(folder)).confusion_matrix.counts.tolist())
    assert all(result == results[0] for result in results)


def test_absent_classes_are_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(tmp_path / "sink", [Image(uri="file:///p/a.jpg", label_map=np.zeros(SHAPE, np.uint8))], CLASSES)
    write_target(tmp_path / "targets" / "a.png", np.zeros(SHAPE, np.uint8))
    evaluate(job(tmp_path, json="-"))
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert [row["iou"] for row in result["classes"]] == [1.0, None, None, None]
    assert result["miou"] == 1.0
    assert "mIoU 1.0000" in captured.err


def test_a_set_of_void_has_no_numbers(tmp_path: Path) -> None:
    write_store(tmp_path / "sink", [Image(uri="file:///p/a.jpg", label_map=np.zeros(SHAPE, np.uint8))], CLASSES)
    write_target(tmp_path / "targets" / "a.png", np.full(SHAPE, 255, np.uint8))
    result = evaluate(job(tmp_path)).to_dict()
    assert (result["miou"], result["pixel_accuracy"], result["num_pixels"]) == (None, None, 0)


def test_16_bit_targets(tmp_path: Path) -> None:
    classes = Classes(tuple(f"class {i}" for i in range(300)), ignore_index=65535)
    label_map = np.arange(24 * 12, dtype=np.uint16).reshape(24, 12)
    write_store(tmp_path / "sink", [Image(uri="file:///p/a.tif", label_map=label_map)], classes)
    target = label_map.copy()
    target[0] = 65535
    write_target(tmp_path / "targets" / "a.PNG", target)
    result = evaluate(job(tmp_path)).to_dict()
    assert (result["miou"], result["num_pixels"]) == (1.0, 23 * 12)


def test_what_has_no_counterpart_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blank = np.zeros(SHAPE, np.uint8)
    images = [Image(uri=f"file:///p/{name}.jpg", label_map=blank) for name in ("both", *map(str, range(9)))]
    write_store(tmp_path / "sink", images, CLASSES)
    for name in ("both", "lonely"):
        write_target(tmp_path / "targets" / f"{name}.png", blank)
    (tmp_path / "targets" / "notes.txt").write_text("no target")
    evaluation = evaluate(job(tmp_path))
    assert evaluation.num_images == 1
    assert evaluation.images_without_target.count == 9
    assert evaluation.images_without_target.first == tuple(f"file:///p/{i}.jpg" for i in range(5))
    assert evaluation.targets_without_image.count == 1
    assert "lonely.png" in capsys.readouterr().out


def test_nothing_in_common(tmp_path: Path) -> None:
    blank = np.zeros(SHAPE, np.uint8)
    write_store(tmp_path / "sink", [Image(uri="file:///p/a.jpg", label_map=blank)], CLASSES)
    write_target(tmp_path / "targets" / "b.png", blank)
    with pytest.raises(SourceError, match=r"b\.png, images file:///p/a\.jpg"):
        evaluate(job(tmp_path))


def test_two_targets_of_one_name(tmp_path: Path) -> None:
    blank = np.zeros(SHAPE, np.uint8)
    write_store(tmp_path / "sink", [Image(uri="file:///p/a.jpg", label_map=blank)], CLASSES)
    write_target(tmp_path / "targets" / "x" / "a.png", blank)
    write_target(tmp_path / "targets" / "y" / "a.png", blank)
    with pytest.raises(SourceError, match=r"x/a\.png and .*y/a\.png are both called 'a'"):
        evaluate(job(tmp_path))


def test_two_images_of_one_name(tmp_path: Path) -> None:
    blank = np.zeros(SHAPE, np.uint8)
    images = [Image(uri=f"file:///{folder}/a.jpg", label_map=blank) for folder in "yx"]
    write_store(tmp_path / "sink", images, CLASSES)
    write_target(tmp_path / "targets" / "a.png", blank)
    with pytest.raises(SinkError, match=r"/x/a\.jpg and file:///y/a\.jpg are both called 'a'"):
        evaluate(job(tmp_path))


def test_an_image_that_changed_counts_once_as_last_labelled(tmp_path: Path) -> None:
    for run, class_id in (("20261123T000000Z-bb", 1), ("20261122T000000Z-aa", 0)):
        label_map = np.full(SHAPE, class_id, np.uint8)
        image = Image(uri="file:///p/a.jpg", label_map=label_map, image_id=run)
        write_store(tmp_path / "sink", [image], CLASSES, run_id=run)
    write_target(tmp_path / "targets" / "a.png", np.ones(SHAPE, np.uint8))
    evaluation = evaluate(job(tmp_path))
    assert evaluation.num_images == 1
    assert evaluation.confusion_matrix.pixel_accuracy() == 1.0
    assert evaluation.run_id == "20261123T000000Z-bb"


def test_an_image_that_two_runs_labelled_counts_once(tmp_path: Path) -> None:
    for run in ("20261122T000000Z-aa", "20261122T000000Z-bb"):
        image = Image(uri="file:///p/a.jpg", label_map=np.zeros(SHAPE, np.uint8))
        write_store(tmp_path / "sink", [image], CLASSES, run_id=run)
    write_target(tmp_path / "targets" / "a.png", np.zeros(SHAPE, np.uint8))
    assert evaluate(job(tmp_path)).confusion_matrix.counts.sum() == SHAPE[0] * SHAPE[1]


def test_void_may_have_another_id(tmp_path: Path) -> None:
    write_store(tmp_path / "sink", [Image(uri="file:///p/a.jpg", label_map=np.zeros(SHAPE, np.uint8))], CLASSES)
    target = np.zeros(SHAPE, np.uint8)
    target[:6] = 11
    write_target(tmp_path / "targets" / "a.png", target)
    with pytest.raises(RunError, match=r"a\.png: .*\[11\].*--ignore-index"):
        evaluate(job(tmp_path))
    assert evaluate(job(tmp_path, ignore_index=11)).to_dict()["num_pixels"] == 18 * 32
    with pytest.raises(SettingsError, match="'weed'"):
        evaluate(job(tmp_path, ignore_index=2))
    with pytest.raises(SettingsError, match="-1"):
        job(tmp_path, ignore_index=-1)


def test_a_target_of_another_size(tmp_path: Path) -> None:
    write_store(tmp_path / "sink", [Image(uri="file:///p/a.jpg", label_map=np.zeros(SHAPE, np.uint8))], CLASSES)
    write_target(tmp_path / "targets" / "a.png", np.zeros((10, 12), np.uint8))
    with pytest.raises(RunError, match=r"a\.png: .*10×12.*24×32.*file:///p/a\.jpg"):
        evaluate(job(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n nonsense", "colour"])
def test_a_target_that_is_no_label_map(tmp_path: Path, content: bytes | str) -> None:
    write_store(tmp_path / "sink", [Image(uri="file:///p/a.jpg", label_map=np.zeros(SHAPE, np.uint8))], CLASSES)
    path = tmp_path / "targets" / "a.png"
    if isinstance(content, bytes):
        path.parent.mkdir()
        path.write_bytes(content)
    else:
        write_target(path, np.zeros((*SHAPE, 3), np.uint8))
    with pytest.raises(RunError, match=r"a\.png: the target cannot be read"):
        evaluate(job(tmp_path))


def test_the_newest_run_chooses_the_recipe(tmp_path: Path) -> None:
    image = Image(uri="file:///p/a.jpg", label_map=np.zeros(SHAPE, np.uint8))
    write_store(tmp_path / "sink", [image], CLASSES, recipe="new", run_id="20270101T000000Z-aa")
    write_store(tmp_path / "sink", [image], CLASSES, recipe="old", run_id="20260101T000000Z-bb")
    write_target(tmp_path / "targets" / "a.png", np.zeros(SHAPE, np.uint8))
    assert evaluate(job(tmp_path)).recipe == "new"
    assert evaluate(job(tmp_path, recipe="old")).run_id == "20260101T000000Z-bb"
    with pytest.raises(SinkError, match=r"no recipe other; --recipe can be new, old"):
        evaluate(job(tmp_path, recipe="other"))


def test_stores_that_are_none(tmp_path: Path) -> None:
    write_target(tmp_path / "targets" / "a.png", np.zeros(SHAPE, np.uint8))
    with pytest.raises(SinkError, match="there is no label store"):
        evaluate(job(tmp_path))
    (tmp_path / "sink").mkdir()
    with pytest.raises(SinkError, match="not a label store"):
        evaluate(job(tmp_path))
    write_store(tmp_path / "sink", [], CLASSES)
    with pytest.raises(SinkError, match="has no label maps"):
        evaluate(job(tmp_path))


def test_targets_that_are_none(tmp_path: Path) -> None:
    write_store(tmp_path / "sink", [Image(uri="file:///p/a.jpg", label_map=np.zeros(SHAPE, np.uint8))], CLASSES)
    with pytest.raises(SourceError, match="there is no PNG"):
        evaluate(job(tmp_path))


def test_names_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = Classes(("[red]soil", ":smile:"))
    write_store(tmp_path / "sink", [Image(uri="file:///p/a.jpg", label_map=np.zeros(SHAPE, np.uint8))], classes)
    write_target(tmp_path / "targets" / "a.png", np.zeros(SHAPE, np.uint8))
    evaluate(job(tmp_path))
    printed = capsys.readouterr().out
    assert "[red]soil" in printed
    assert ":smile:" in printed


@pytest.fixture
def labelled_scene(tmp_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A scene of 40×50 pixels in windows of 32, without data on the left: its target, with nodata, and label map."""
    rng = np.random.default_rng(0)
    target = rng.integers(0, 4, (40, 50)).astype(np.uint8)
    label_map = np.where(rng.random(target.shape) < 0.7, target, 0).astype(np.uint8)
    label_map[:, :5] = 255
    target[:3] = 99
    raster = write_raster(tmp_path / "scenes/field.tif", np.ones((3, 40, 50), np.uint8))
    write_store(tmp_path / "sink", windows(raster, label_map, 32), CLASSES, scenes={"size": 32})
    return target, label_map


def test_each_window_of_a_scene_is_compared_with_its_part_of_the_target(
    tmp_path: Path, labelled_scene: tuple[np.ndarray, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    target, label_map = labelled_scene
    write_raster(tmp_path / "targets/sub/field.tif", target[None], nodata=99)
    write_raster(tmp_path / "targets/other.tif", target[None], nodata=99)
    evaluation = evaluate(job(tmp_path))
    counted = target[3:, 5:], label_map[3:, 5:]
    matrix = np.zeros((4, 4), np.int64)
    np.add.at(matrix, counted, 1)
    np.testing.assert_array_equal(evaluation.confusion_matrix.counts, matrix)
    assert evaluation.num_images == 4
    assert evaluation.targets_without_image.count == 1
    assert "on 4 windows" in capsys.readouterr().out


def test_void_in_the_target_of_a_scene_is_nodata_and_the_ignore_index(
    tmp_path: Path, labelled_scene: tuple[np.ndarray, np.ndarray]
) -> None:
    target, _ = labelled_scene
    write_raster(tmp_path / "targets/field.tif", target[None])
    with pytest.raises(RunError, match=r"field\.tif: the target holds the ids \[99\].* --ignore-index"):
        evaluate(job(tmp_path))
    assert evaluate(job(tmp_path, ignore_index=99)).to_dict()["num_pixels"] == 37 * 45
    write_raster(tmp_path / "targets/field.tif", target[None].astype(np.float32) / 2, nodata=49.5)
    with pytest.raises(
        RunError, match=r"field\.tif: the target cannot be read: .*it holds \d\.5, which is no class id"
    ):
        evaluate(job(tmp_path))


@pytest.mark.parametrize(
    ("shape", "form", "wrong"),
    [
        ((40, 50), {"crs": "EPSG:32634"}, "EPSG:32634 and EPSG:32633"),
        ((40, 50), {"transform": TRANSFORM @ TRANSFORM.translation(0.1, 0)}, r"its transform at column 0 and row 0 is"),
        ((40, 50), {"transform": TRANSFORM @ TRANSFORM.scale(1.001)}, r"its transform at column 0 and row 0 is"),
        ((40, 51), {}, "51 columns and 50"),
        ((39, 50), {}, "39 rows and 40"),
        ((30, 50), {}, "30 rows and at least 32"),
    ],
)
def test_a_target_on_another_grid_is_an_error_that_names_both(
    shape: tuple[int, int],
    form: dict[str, Any],
    wrong: str,
    tmp_path: Path,
    labelled_scene: tuple[np.ndarray, np.ndarray],
) -> None:
    write_raster(tmp_path / "targets/field.tif", np.zeros((1, *shape), np.uint8), **form)
    both = r"targets/field\.tif: the target is on another grid than the scene file://.*/scenes/field\.tif: "
    with pytest.raises(RunError, match=both + wrong):
        evaluate(job(tmp_path))


def test_a_target_that_is_no_raster_of_ids_is_named(
    tmp_path: Path, labelled_scene: tuple[np.ndarray, np.ndarray]
) -> None:
    (tmp_path / "targets").mkdir()
    with pytest.raises(SourceError, match=r"there is no GeoTIFF \(\*\.tif\); give a folder or prefix of GeoTIFFs"):
        evaluate(job(tmp_path))
    write_raster(tmp_path / "targets/field.tif", np.zeros((3, 40, 50), np.uint8))
    with pytest.raises(RunError, match=r"field\.tif: the target has 3 bands; one with the class ids is wanted"):
        evaluate(job(tmp_path))
    (tmp_path / "targets/field.tif").write_bytes(b"no raster")
    with pytest.raises(RunError, match=r"field\.tif: the target cannot be read: not a raster"):
        evaluate(job(tmp_path))
    (tmp_path / "targets/field.tif").rename(tmp_path / "targets/other.tif")
    with pytest.raises(
        SourceError, match=r"none of 1 targets has the name of one of the 1 images.* images file://.*tif$"
    ):
        evaluate(job(tmp_path))


def test_of_a_scene_that_was_labelled_again_its_newest_version_counts(tmp_path: Path) -> None:
    for run_id, height, class_id in (("2026a", 40, 1), ("2026b", 33, 2)):
        raster = write_raster(tmp_path / "scenes/field.tif", np.ones((1, height, 50), np.uint8))
        images = [
            dataclasses.replace(image, place={**image.place, "version": run_id}, image_id=f"{run_id}-{index}")
            for index, image in enumerate(windows(raster, np.full((height, 50), class_id, np.uint8), 32))
        ]
        write_store(tmp_path / "sink", images, CLASSES, scenes={"size": 32}, run_id=run_id)
    write_raster(tmp_path / "targets/field.tif", np.full((1, 33, 50), 2, np.uint8))
    result = evaluate(job(tmp_path)).to_dict()
    assert (result["num_images"], result["num_pixels"], result["pixel_accuracy"]) == (4, 33 * 50, 1.0)
