import base64
import io
import json
import math
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from segray import bandfile, demo, model, pairs
from segray.classes import Classes
from segray.curves import _find, _photo
from segray.errors import SettingsError, SinkError
from segray.labelmap import decode_png, encode_png
from segray.model import Checkpoint
from segray.predict import Prediction, Predictor
from segray.report import Report, report
from segray.statistics import ConfusionMatrix
from tests import test_report
from tests.test_report import HOSTILE, Open, page_data

browser, open_page = test_report.browser, test_report.open_page
pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = "unet_tu-mobilenetv3_small_050"
NUM_EPOCHS, NUM_STEPS = 3, 4
SIDE = 64


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sink as `train` writes it, of a real training, small: two shards, three epochs of four steps."""
    folder = tmp_path_factory.mktemp("trained")
    demo.draw(demo.Draw(sink=str(folder / "val"), num_scenes=3, format="tar", shard_scenes=2))
    sink = folder / "sink"
    (sink / "validation").mkdir(parents=True)
    surveyed = [pairs.survey(f"file://{shard}", demo.CLASSES) for shard in sorted((folder / "val").glob("*.tar"))]
    index = pa.concat_tables([table for table, _ in surveyed])
    val = [(uri, *pairs.decode_pair(uri, a, b, demo.CLASSES)) for uri, a, b in pairs.read(index)]
    images = torch.from_numpy(np.stack([image[:SIDE, :SIDE] for _, image, _ in val])).permute(0, 3, 1, 2) / 255
    targets = torch.from_numpy(np.stack([target[:SIDE, :SIDE] for _, _, target in val])).long()

    untrained = model.untrained(MODEL, demo.CLASSES, arguments={"decoder_channels": [16, 8, 8, 8, 8]}, seed=0)
    module = model.build(untrained).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.003)
    lines: list[dict[str, Any]] = []
    best = -math.inf
    for epoch in range(1, NUM_EPOCHS + 1):
        losses = []
        for step in range((epoch - 1) * NUM_STEPS + 1, epoch * NUM_STEPS + 1):
            loss = F.cross_entropy(model.logits(module, images), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
            steps = {"kind": "steps", "epoch": epoch, "step": step, "loss": losses[-1], "learning_rate": 0.003 / step}
            lines.append(steps | {"images_per_second": 10.0 + step, "seconds": 0.5})
        checkpoint = replace(untrained, tensors=module.state_dict())
        confusion, ranked = validate(checkpoint, val)
        iou = [None if np.isnan(value) else float(value) for value in confusion.iou()]
        lines.append(
            {
                "kind": "epoch",
                "epoch": epoch,
                "step": epoch * NUM_STEPS,
                "loss": float(np.mean(losses)),
                "learning_rate": 0.003 / (epoch * NUM_STEPS),
                "miou": confusion.miou(),
                "pixel_accuracy": confusion.pixel_accuracy(),
                "iou": dict(zip(demo.CLASSES.names, iou, strict=True)),
                "seconds": 2.5,
                "validation_seconds": 0.5,
            }
        )
        document = {"epoch": epoch, "confusion": confusion.counts.tolist(), "worst": ranked}
        (sink / "validation" / f"epoch-{epoch:04d}.json").write_text(json.dumps(document))
        (sink / "last.safetensors").write_bytes(checkpoint.to_bytes())
        if confusion.miou() > best:
            best, best_epoch = confusion.miou(), epoch
            shutil.copy(sink / "last.safetensors", sink / "checkpoint.safetensors")
    (sink / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {
        "status": "finished",
        "command": f"python jobs/train.py shards sink --model {MODEL}",
        "settings": {"source": "shards", "model": MODEL, "num_epochs": NUM_EPOCHS},
        "classes": demo.CLASSES.to_dict(),
        "data": {"train": {"uri": "shards", "images": 3}, "val": {"uri": f"file://{folder}/val", "images": 3}},
        "num_steps": NUM_EPOCHS * NUM_STEPS,
        "steps_per_epoch": NUM_STEPS,
        "seed": 0,
        "versions": {"segray": "0.1.0", "torch": torch.__version__},
        "started": "2026-11-22T08:00:00+00:00",
        "finished": "2026-11-22T08:01:30+00:00",
        "best_epoch": best_epoch,
        "workers": 1,
    }
    (sink / "training.json").write_text(json.dumps(record))
    return folder


def validate(
    checkpoint: Checkpoint, val: list[tuple[str, np.ndarray, np.ndarray]]
) -> tuple[ConfusionMatrix, list[dict[str, Any]]]:
    """The matrix of all pairs, and each pair's own numbers, the worst first."""
    total, entries = ConfusionMatrix.zeros(len(checkpoint.classes)), []
    predictions = Predictor(checkpoint.to_bytes).predict([image for _, image, _ in val])
    for (uri, _, target), prediction in zip(val, predictions, strict=True):
        assert isinstance(prediction, Prediction)
        confusion = ConfusionMatrix.of(target, prediction.label_map, len(checkpoint.classes), 255)
        total += confusion
        entries.append({"uri": uri, "miou": confusion.miou(), "pixel_accuracy": confusion.pixel_accuracy()})
    return total, sorted(entries, key=lambda entry: entry["miou"])


@pytest.fixture
def sink(trained: Path, tmp_path: Path) -> Path:
    """The sink's own copy for one test; the shards stay where they are."""
    return Path(shutil.copytree(trained / "sink", tmp_path / "sink", ignore=shutil.ignore_patterns("last.*")))


def edit(path: Path, **fields: Any) -> dict[str, Any]:
    """Replaces fields of a JSON file."""
    document: dict[str, Any] = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(document))
    return document


def edit_best(sink: Path, **fields: Any) -> dict[str, Any]:
    """Replaces fields of the best epoch's validation."""
    best = json.loads((sink / "training.json").read_text())["best_epoch"]
    return edit(sink / "validation" / f"epoch-{best:04d}.json", **fields)


def drawn(sink: Path, **options: Any) -> dict[str, Any]:
    """The data of the sink's page."""
    return page_data(report(Report(sink=str(sink), **options)))


def pixels(data_uri: str) -> np.ndarray:
    """The embedded image, RGBA."""
    with Image.open(io.BytesIO(base64.b64decode(data_uri.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGBA"))


def test_the_page_holds_what_was_measured(sink: Path) -> None:
    page = drawn(sink, num_images=0)
    lines = [json.loads(line) for line in (sink / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "steps"]
    assert page["title"] == MODEL
    assert page["training"] == json.loads((sink / "training.json").read_text())
    assert [point["loss"] for point in page["steps"]] == [line["loss"] for line in steps]
    assert [point["step"] for point in page["steps"]] == list(range(1, NUM_EPOCHS * NUM_STEPS + 1))
    assert [point["learning_rate"] for point in page["steps"]] == [line["learning_rate"] for line in steps]
    assert page["images_per_second"] == np.median([line["images_per_second"] for line in steps])
    assert page["epochs"] == [line for line in lines if line["kind"] == "epoch"]
    assert [c["name"] for c in page["classes"]] == list(demo.CLASSES.names)
    assert page["classes"][1]["colour"] == "#009e73"
    assert page["worst"] == []


def test_the_confusion_matrix_is_that_of_the_best_epoch(sink: Path) -> None:
    page = drawn(sink, num_images=0)
    best = max(page["epochs"], key=lambda epoch: epoch["miou"])
    confusion = ConfusionMatrix(np.array(page["confusion"]))
    assert page["best_epoch"] == best["epoch"]
    assert confusion.miou() == best["miou"]
    assert dict(zip(demo.CLASSES.names, confusion.iou(), strict=True)) == best["iou"]
    edit(sink / "training.json", best_epoch=1)
    assert ConfusionMatrix(np.array(drawn(sink, num_images=0)["confusion"])).miou() == page["epochs"][0]["miou"]


def test_the_worst_images_are_shown_as_the_best_checkpoint_labels_them(sink: Path) -> None:
    page = drawn(sink)
    recorded = edit_best(sink)["worst"]
    assert [image["uri"] for image in page["worst"]] == [entry["uri"] for entry in recorded]
    predictor = Predictor((sink / "checkpoint.safetensors").read_bytes)
    for image, entry in zip(page["worst"], recorded, strict=True):
        assert image["missing"] is None
        assert image["name"].startswith("scene-1")
        photo, target = demo.scene(int(image["name"].removeprefix("scene-")))
        np.testing.assert_array_equal(pixels(image["target"])[:, :, :3], colours(target))
        assert np.abs(pixels(image["image"])[:, :, :3].astype(int) - photo).mean() < 8
        with tarfile.open(image["uri"].removeprefix("file://").partition("#")[0]) as shard:
            file = shard.extractfile(f"{image['name']}.jpg")
            assert file is not None
            (prediction,) = predictor.predict([np.asarray(Image.open(file))])
        assert isinstance(prediction, Prediction)
        np.testing.assert_array_equal(pixels(image["prediction"])[:, :, :3], colours(prediction.label_map))
        values = [c["iou"] for c in image["iou"]]
        assert values == sorted(values)
        assert np.mean(values) == pytest.approx(entry["miou"]) == pytest.approx(image["miou"])


def test_no_more_images_than_asked_for_and_never_more_than_eight(sink: Path) -> None:
    worst = edit_best(sink)["worst"]
    assert [image["uri"] for image in drawn(sink, num_images=2)["worst"]] == [entry["uri"] for entry in worst[:2]]
    edit_best(sink, worst=worst * 4)
    assert len(drawn(sink)["worst"]) == 8


def test_void_is_blank(sink: Path, tmp_path: Path) -> None:
    _, image, target = demo.encoded(7)
    label_map = decode_png(target).copy()
    label_map[:40] = demo.CLASSES.ignore_index
    shard = write_shard(tmp_path / "void.tar", {"a": (image, encode_png(label_map, demo.CLASSES.palette))})
    edit_best(sink, worst=[{"uri": f"{shard}#a", "miou": 0.1, "pixel_accuracy": 0.2}])
    (shown,) = drawn(sink)["worst"]
    np.testing.assert_array_equal(pixels(shown["target"])[:, :, 3] == 0, label_map == demo.CLASSES.ignore_index)
    assert pixels(shown["prediction"])[:, :, 3].min() == 255


def test_a_large_image_is_made_smaller(sink: Path, tmp_path: Path) -> None:
    photo, target = io.BytesIO(), np.zeros((300, 1280), np.uint8)
    Image.new("RGB", (1280, 300), (90, 60, 40)).save(photo, "PNG")
    shard = write_shard(tmp_path / "large.tar", {"a": (photo.getvalue(), encode_png(target, demo.CLASSES.palette))})
    edit_best(sink, worst=[{"uri": f"{shard}#a", "miou": 0.1, "pixel_accuracy": 0.2}])
    (shown,) = drawn(sink)["worst"]
    assert {pixels(shown[kind]).shape for kind in ("image", "target", "prediction")} == {(150, 640, 4)}
    assert (shown["height"], shown["width"]) == (300, 1280)


def test_pairs_are_found_in_parquet_and_with_the_index_beside_a_shard(sink: Path, tmp_path: Path) -> None:
    demo.draw(demo.Draw(sink=str(tmp_path / "rows"), num_scenes=3, format="parquet"))
    rows = f"file://{tmp_path}/rows/shard-000000.parquet"
    good = demo.encoded(1)[1:]
    # A survey would stumble over the bad pair; with the index the other one is read alone.
    shard = write_shard(tmp_path / "indexed" / "x.tar", {"good": good, "bad": good})
    index, census = pairs.survey(shard, demo.CLASSES)
    sizes = index["image_bytes"].to_pylist()[1], index["target_bytes"].to_pylist()[1]
    write_shard(tmp_path / "indexed" / "x.tar", {"good": good, "bad": (b"x" * sizes[0], b"x" * sizes[1])})
    uris = [f"{rows}#scene-1000001", f"{shard}#good", f"{shard}#bad"]
    edit_best(sink, worst=[{"uri": uri, "miou": 0.1, "pixel_accuracy": 0.2} for uri in uris])
    assert [image["missing"] is None for image in drawn(sink)["worst"]] == [True, False, False]
    (tmp_path / "indexed" / pairs.INDEX_NAME).write_bytes(pairs.write_index(index, census))
    row, indexed, damaged = drawn(sink)["worst"]
    assert (row["missing"], indexed["missing"]) == (None, None)
    assert "bad: the image cannot be decoded" in damaged["missing"]
    np.testing.assert_array_equal(pixels(row["target"])[:, :, :3], colours(demo.scene(1_000_001)[1]))
    np.testing.assert_array_equal(pixels(indexed["target"])[:, :, :3], colours(demo.scene(1)[1]))


def test_windows_of_scenes_are_shown_in_the_colours_of_their_names(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(8, 9, 4)).astype(np.float32)
    values[0, :3] = np.nan
    target = encode_png(np.zeros((8, 9), np.uint8), demo.CLASSES.palette)
    photos = []
    for name, order in (("rgb", [0, 1, 2, 3]), ("bgr", [2, 1, 0, 3])):
        bands = np.array(["red", "green", "blue", "nir"])[order].tolist()
        image = bandfile.encode_values(values[:, :, order], bands)
        uri = write_shard(tmp_path / name / "shard-000000.tar", {"0": (image, target)}, "npz")
        pair = _find([f"{uri}#0"], demo.CLASSES)[f"{uri}#0"]
        assert not isinstance(pair, str), pair
        photos.append(_photo(*pair[:2]))
    np.testing.assert_array_equal(photos[0], photos[1])
    assert (photos[0][0, :3] == 0).all()
    assert photos[0][:, :, 0].std() > 30


def test_an_image_that_is_gone_says_so_in_its_place(sink: Path, tmp_path: Path) -> None:
    known = edit_best(sink)["worst"][0]["uri"]
    uris = [f"file://{tmp_path}/gone.tar#a", known, known + "x"]
    edit_best(sink, worst=[{"uri": uri, "miou": 0.1, "pixel_accuracy": 0.2} for uri in uris])
    gone, there, renamed = drawn(sink)["worst"]
    assert f"{tmp_path}/gone.tar cannot be read" in gone["missing"]
    assert renamed["missing"] == "the shard has no such pair any more"
    assert there["missing"] is None
    assert (gone["image"], gone["name"], gone["miou"]) == (None, "a", 0.1)


@pytest.mark.parametrize("content", [None, b"no tensors"])
def test_without_a_checkpoint_image_and_target_are_shown_alone(sink: Path, content: bytes | None) -> None:
    (sink / "checkpoint.safetensors").unlink()
    if content is not None:
        (sink / "checkpoint.safetensors").write_bytes(content)
    (image,) = drawn(sink, num_images=1)["worst"]
    assert image["image"] is not None
    assert image["target"] is not None
    assert image["prediction"] is None
    assert "there is no prediction: " in image["missing"]


def test_a_training_that_runs_is_drawn_as_far_as_it_goes(sink: Path) -> None:
    edit(sink / "training.json", status="running", finished=None, best_epoch=None)
    lines = (sink / "metrics.jsonl").read_text().splitlines(keepends=True)
    (sink / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:17])  # the writer is at work
    page = drawn(sink)
    assert [point["step"] for point in page["steps"]] == [1, 2, 3]
    assert (page["epochs"], page["confusion"], page["worst"]) == ([], None, [])
    (sink / "metrics.jsonl").unlink()
    page = drawn(sink)
    assert (page["steps"], page["epochs"], page["images_per_second"]) == ([], [], None)


def test_the_best_epoch_of_a_training_that_runs_is_the_first_with_the_highest_miou(sink: Path) -> None:
    edit(sink / "training.json", status="running", finished=None, best_epoch=None)
    lines = [json.loads(line) for line in (sink / "metrics.jsonl").read_text().splitlines()]
    for line, miou in zip((line for line in lines if line["kind"] == "epoch"), (0.1, 0.3, 0.3), strict=True):
        line["miou"] = miou
    (sink / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = drawn(sink, num_images=0)
    assert page["best_epoch"] == 2
    assert page["confusion"] == json.loads((sink / "validation" / "epoch-0002.json").read_text())["confusion"]


def test_a_best_epoch_whose_validation_is_gone(sink: Path) -> None:
    shutil.rmtree(sink / "validation")
    page = drawn(sink)
    assert (page["confusion"], page["worst"]) == (None, [])
    assert len(page["epochs"]) == NUM_EPOCHS


def test_a_loss_that_is_not_finite_is_a_gap(sink: Path) -> None:
    edit(sink / "training.json", status="failed")
    lines = [json.loads(line) for line in (sink / "metrics.jsonl").read_text().splitlines()]
    lines[2]["loss"], lines[4]["loss"], lines[4]["miou"] = math.nan, math.inf, math.nan
    (sink / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = report(Report(sink=str(sink), num_images=0))
    page = page_data(path)
    assert [point["loss"] is None for point in page["steps"][:4]] == [False, False, True, False]
    assert (page["epochs"][0]["loss"], page["epochs"][0]["miou"]) == (None, None)
    assert "NaN" not in json.dumps(page)
    assert "Infinity" not in json.dumps(page)


def test_a_long_training_stays_small_and_keeps_its_mean(sink: Path) -> None:
    losses = np.random.default_rng(0).uniform(0, 1, 10_000)
    line = {"kind": "steps", "epoch": 1, "images_per_second": 1.0, "seconds": 1.0}
    lines = [line | {"step": 20 * i, "loss": float(loss), "learning_rate": 1 / i} for i, loss in enumerate(losses, 1)]
    (sink / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = drawn(sink, num_images=0)["steps"]
    assert len(steps) == 400
    assert steps[0] == {"step": 500, "loss": pytest.approx(losses[:25].mean()), "learning_rate": 1 / 25}
    assert steps[-1]["step"] == 200_000
    assert np.mean([point["loss"] for point in steps]) == pytest.approx(losses.mean())


def test_a_sink_that_is_neither_hears_of_both(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(SinkError, match=r"`segray label SOURCE .* makes.*`segray train SOURCE .* writes"):
            report(Report(sink=str(folder)))
    with pytest.raises(SinkError, match="nosuch://x: the sink cannot be read"):
        report(Report(sink="nosuch://x", html=str(tmp_path / "page.html")))


@pytest.mark.parametrize("option", ["recipe", "run", "image_id", "export"])
def test_what_only_a_label_store_has_is_refused(sink: Path, option: str) -> None:
    with pytest.raises(SettingsError, match=f"--{option.replace('_', '-')} is for label stores"):
        drawn(sink, **{option: "x"})


def test_damaged_files_are_named(sink: Path) -> None:
    lines = (sink / "metrics.jsonl").read_text()
    (sink / "metrics.jsonl").write_text(lines.replace('"kind"', "kind", 2))
    with pytest.raises(SinkError, match=r"metrics.jsonl, line 1 is damaged"):
        drawn(sink)
    (sink / "training.json").write_text('{"status": ')
    with pytest.raises(SinkError, match=r"training.json is damaged"):
        drawn(sink)


def test_a_sink_in_another_store(sink: Path) -> None:
    fs = pytest.importorskip("fsspec").filesystem("memory")
    fs.put(str(sink), "/trained", recursive=True)
    job = Report(sink="memory://trained", html="memory://pages/curves.html", num_images=1)
    assert report(job) == "memory://pages/curves.html"
    assert MODEL.encode() in fs.cat_file("/pages/curves.html")


# In a browser.


def test_the_page_in_a_browser(sink: Path, open_page: Open) -> None:
    page = open_page(report(Report(sink=str(sink))))
    best = max(page_data(sink / "report.html")["epochs"], key=lambda epoch: epoch["miou"])
    assert page.title() == f"{MODEL} · segray report"
    assert page.locator(".status").inner_text() == "finished"
    assert page.locator(".sum dd").first.inner_text() == f"{best['miou']:.3f}"
    assert page.locator(".facts dd").first.inner_text() == "12 of 12"
    assert page.locator(".plots:not(.small) figcaption b").all_inner_texts() == [
        "Loss",
        "Learning rate",
        "mIoU",
        "Pixel accuracy",
    ]
    assert page.locator(".plots.small figure").count() == 4
    assert all(label for label in page.evaluate("[...document.querySelectorAll('svg')].map((svg) => svg.ariaLabel)"))
    assert page.locator("figure.worst img").count() == 9
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0 && image.alt)")
    assert [text.split()[0] for text in page.locator("details summary").all_inner_texts()] == [
        "As",
        "Command",
        "Settings",
        "Data",
        "Versions",
    ]


def test_lines_go_where_the_numbers_are(sink: Path, open_page: Open) -> None:
    page = open_page(report(Report(sink=str(sink), num_images=0)))
    epochs = page_data(sink / "report.html")["epochs"]
    (miou,) = (p for p in page.locator("figure.plot").all() if p.locator("b").inner_text() == "mIoU")
    points = [point.split(",") for point in miou.locator("polyline").get_attribute("points").split()]
    assert [float(x) for x, _ in points] == pytest.approx([100 * i / NUM_EPOCHS for i in (1, 2, 3)], abs=0.01)
    assert [float(y) for _, y in points] == pytest.approx([100 - 100 * epoch["miou"] for epoch in epochs], abs=0.01)
    assert [span.inner_text() for span in miou.locator("span.y").all()] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    top, bottom = (miou.locator("span.y").nth(i).bounding_box()["y"] for i in (5, 0))
    dot = miou.locator(".dots.best").bounding_box()
    best = max(epoch["miou"] for epoch in epochs)
    label_height = miou.locator("span.y").first.bounding_box()["height"]
    expected = bottom + label_height / 2 - best * (bottom - top)
    assert dot["y"] + dot["height"] / 2 == pytest.approx(expected, abs=1)


def test_the_confusion_matrix_in_a_browser(sink: Path, open_page: Open) -> None:
    page = open_page(report(Report(sink=str(sink), num_images=0)))
    counts = np.array(page_data(sink / "report.html")["confusion"])
    rows = page.locator("table.matrix tbody tr")
    assert page.locator("table.matrix thead th").all_inner_texts()[1:] == [*demo.CLASSES.names, "pixels"]
    assert rows.count() == 4
    for target in range(4):
        cells = rows.nth(target).locator("td")
        assert rows.nth(target).locator("th").inner_text().strip() == demo.CLASSES.names[target]
        assert cells.nth(4).inner_text() == f"{counts[target].sum():,}"
        for prediction in range(4):
            part = counts[target, prediction] / counts[target].sum()
            cell = cells.nth(prediction)
            assert cell.inner_text() == (f"{100 * part:.1f}" if counts[target, prediction] else "")
            assert f" {counts[target, prediction]:,} pixel" in cell.get_attribute("title")
            assert float(cell.evaluate("(node) => node.style.getPropertyValue('--share')")) == pytest.approx(
                part, abs=1e-4
            )


@pytest.mark.parametrize(
    ("status", "text"),
    [
        ("running", "had not ended when the page was made, after 12 of 40 steps"),
        ("interrupted", "was interrupted after 12 of 40 steps"),
        ("failed", "This training failed after 12 of 40 steps"),
        ("stopped early", "stopped early, after 12 of 40 steps"),
    ],
)
def test_how_it_stands_is_said(sink: Path, open_page: Open, status: str, text: str) -> None:
    edit(sink / "training.json", status=status, num_steps=40, finished=None)
    page = open_page(report(Report(sink=str(sink), num_images=0)))
    assert page.locator(".status").inner_text() == status
    assert text in page.locator("main").inner_text()
    # What is open is drawn on the width of what was planned.
    last = page.locator("figure.plot").first.locator("polyline").get_attribute("points").split()[-1]
    assert float(last.split(",")[0]) == pytest.approx(100 if status == "stopped early" else 30)


def test_before_the_first_validation(sink: Path, open_page: Open) -> None:
    edit(sink / "training.json", status="running", best_epoch=None, finished=None)
    lines = (sink / "metrics.jsonl").read_text().splitlines(keepends=True)
    (sink / "metrics.jsonl").write_text("".join(lines[:3]))
    page = open_page(report(Report(sink=str(sink))))
    assert "No epoch has been validated yet" in page.locator("main").inner_text()
    assert page.locator("figure.plot").count() == 2
    (sink / "metrics.jsonl").write_text("")
    page = open_page(report(Report(sink=str(sink))))
    assert "Nothing has been measured yet" in page.locator("main").inner_text()


def test_a_gap_and_an_absent_class_in_a_browser(sink: Path, open_page: Open) -> None:
    edit(sink / "training.json", status="failed")
    lines = [json.loads(line) for line in (sink / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["loss"] = math.nan
        if line["kind"] == "epoch":
            line["iou"]["track"] = None
    (sink / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = open_page(report(Report(sink=str(sink), num_images=0)))
    assert "No finite number yet" in page.locator("figure.plot").first.inner_text()
    assert page.locator(".plots.small figure").count() == 3
    row = page.locator("tr.class", has_text="track")
    assert row.locator("td.number").all_inner_texts()[:2] == ["–", "–"]
    assert row.locator(".bar span").count() == 0


def test_texts_are_texts(sink: Path, open_page: Open) -> None:
    names = [f"</script>{HOSTILE}", "<b>crop</b>", "__proto__", "$data"]
    classes = Classes(tuple(names), demo.CLASSES.palette).to_dict()
    settings = {"model": HOSTILE, "source": HOSTILE}
    edit(sink / "training.json", classes=classes, settings=settings, command=HOSTILE, status="running")
    lines = [json.loads(line) for line in (sink / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "epoch":
            line["iou"] = dict(zip(names, line["iou"].values(), strict=True))
    (sink / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    edit_best(sink, worst=[{"uri": f"s3{HOSTILE}.tar#{HOSTILE}", "miou": 0.1, "pixel_accuracy": 0.2}])
    page = open_page(report(Report(sink=str(sink))))
    assert page.locator("h1").inner_text() == HOSTILE.rpartition("/")[2]
    shown = {text.strip() for text in page.locator("table.matrix tbody th").all_inner_texts()}
    assert shown == set(names)
    assert page.locator("figure.worst code").inner_text() == f"s3{HOSTILE}.tar#{HOSTILE}"
    assert page.locator("main script, main b b").count() == 0


def test_a_phone(sink: Path, open_page: Open) -> None:
    path = report(Report(sink=str(sink), num_images=1))
    for width in (320, 420):
        page = open_page(path, width, 800, is_mobile=True, has_touch=True)
        for details in page.locator("details").all():
            details.evaluate("(node) => { node.open = true; }")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert all(box.bounding_box()["width"] > 120 for box in page.locator(".pane").all())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(sink: Path, open_page: Open, scheme: str) -> None:
    """Text reaches 4.5 to 1 on the darkest cell of the matrix too, as WCAG AA asks."""
    page = open_page(report(Report(sink=str(sink), num_images=0)), color_scheme=scheme)
    page.evaluate("document.querySelector('.matrix td').style.setProperty('--share', 1)")
    # A canvas turns whatever notation a colour is in into bytes.
    measure = """(node, name) => { const pen = document.createElement("canvas").getContext("2d");
        pen.fillStyle = getComputedStyle(node)[name]; pen.fillRect(0, 0, 1, 1);
        return [...pen.getImageData(0, 0, 1, 1).data]; }"""
    ground = page.locator("body").evaluate(measure, "backgroundColor")
    cell = page.locator(".matrix td").first.evaluate(measure, "backgroundColor")
    assert (luminance(ground) > 0.5) == (scheme == "light")
    assert cell != ground
    for selector, behind in (
        (".matrix td", cell),
        (".field .y", ground),
        (".field .value", ground),
        (".count", ground),
    ):
        text = page.locator(selector).first.evaluate(measure, "color")
        low, high = sorted((luminance(text), luminance(behind)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, selector


def luminance(colour: list[int]) -> float:
    channels = np.array(colour[:3]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def colours(label_map: np.ndarray) -> np.ndarray:
    palette: np.ndarray = np.array(demo.CLASSES.palette, np.uint8)
    coloured: np.ndarray = palette[label_map]
    return coloured


def write_shard(path: Path, samples: dict[str, tuple[bytes, bytes]], extension: str = "jpg") -> str:
    """A tar of pairs by name; returns its URI."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, (image, target) in samples.items():
            for member, data in ((f"{name}.{extension}", image), (f"{name}.target.png", target)):
                entry = tarfile.TarInfo(member)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return f"file://{path}"
