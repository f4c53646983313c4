import base64
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage
from PIL import ImageDraw

from segray.classes import Classes
from segray.errors import RunError, SettingsError, SinkError
from segray.labelmap import decode_png
from segray.report import Report, report
from tests.label_store import Image, windows, write_store
from tests.rasters import write_raster

CLASSES = Classes(("soil", "crop", "weed", "track"), ((120, 90, 60), (40, 160, 60), (220, 60, 160), (90, 90, 200)))
HEIGHT, WIDTH = 60, 80
HOSTILE = "<script>alert(1)</script>&\"'"


def draw(path: Path, seed: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    """Draws a photograph of a field, and returns its label map."""
    rng = np.random.default_rng(seed)
    label_map = PillowImage.new("L", size, 0)
    pen = ImageDraw.Draw(label_map)
    for class_id in (3, 1, 1, 2):
        x, y = rng.integers(0, size[0]), rng.integers(0, size[1])
        pen.ellipse((int(x) - 9, int(y) - 9, int(x) + 9, int(y) + 9), fill=class_id)
    ids = np.asarray(label_map)
    photo = np.asarray(CLASSES.palette, np.uint8)[ids].astype(int) + rng.integers(-30, 30, (*ids.shape, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    PillowImage.fromarray(photo.clip(0, 255).astype(np.uint8)).save(path)
    return ids


def page_data(path: str | Path) -> dict[str, Any]:
    """The data that a page holds."""
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', Path(path).read_text("utf-8"), re.S)
    assert match
    data: dict[str, Any] = json.loads(match[1])
    return data


@pytest.fixture
def sink(tmp_path: Path) -> Path:
    """Thirty images, confidence 0.60 to 0.89 in an order that is not theirs; one has lost its original."""
    images = []
    for i in range(30):
        path = tmp_path / "photos" / f"{i:02d}.jpg"
        label_map = draw(path, i)
        images.append(Image(uri=f"file://{path}", label_map=label_map, confidence=0.6 + (7 * i % 30) / 100))
    (tmp_path / "photos" / "13.jpg").unlink()
    rejects = [(f"file:///in/{HOSTILE}{i}.jpg", "decode", f"truncated: {HOSTILE}") for i in range(7)]
    rejects.append(("s3://bucket/secret.jpg", "fetch", "forbidden: 403"))
    write_store(tmp_path / "sink", images, CLASSES, rejects=rejects)
    return tmp_path / "sink"


def test_the_gallery_is_the_least_confident_then_a_sample_of_the_others(sink: Path) -> None:
    page = page_data(report(Report(sink=str(sink), num_images=9)))
    least, sample = page["galleries"]
    assert [round(image["confidence"], 2) for image in least["images"]] == [0.60, 0.61, 0.62, 0.63, 0.64]
    assert len(sample["images"]) == 4
    shown = [image["image_id"] for group in page["galleries"] for image in group["images"]]
    assert len(set(shown)) == 9
    again = page_data(report(Report(sink=str(sink), num_images=9)))
    assert again["galleries"] == page["galleries"]
    other = page_data(report(Report(sink=str(sink), num_images=9, seed=1)))
    assert other["galleries"][0] == least
    assert other["galleries"][1] != sample


def test_the_sample_does_not_depend_on_the_parts(tmp_path: Path) -> None:
    images = [Image(uri=f"file:///p/{i}.jpg", label_map=np.zeros((4, 4), np.uint8)) for i in range(20)]
    drawn = []
    for per_part in (2, 20):
        folder = tmp_path / str(per_part)
        write_store(folder, images[:: per_part - 1], CLASSES, per_part=per_part)
        write_store(folder, images, CLASSES, per_part=per_part)
        drawn.append(page_data(report(Report(sink=str(folder), num_images=6)))["galleries"])
    assert drawn[0] == drawn[1]


def test_class_statistics_add_up(tmp_path: Path) -> None:
    images = [
        Image(uri="file:///a.jpg", label_map=np.array([[0, 0, 0, 1]], np.uint8), confidence={0: 0.5, 1: 1.0}),
        Image(uri="file:///b.jpg", label_map=np.array([[1, 1, 1, 1]], np.uint8), confidence={1: 0.8}),
        Image(uri="file:///c.jpg", label_map=np.array([[0, 2, 2, 2]], np.uint8), confidence=None),
    ]
    write_store(tmp_path, images, CLASSES, per_part=2)
    page = page_data(report(Report(sink=str(tmp_path))))
    soil, crop, weed, track = page["classes"]
    assert [c["num_pixels"] for c in page["classes"]] == [4, 5, 3, 0]
    assert sum(c["fraction"] for c in page["classes"]) == pytest.approx(1)
    assert [c["num_images"] for c in page["classes"]] == [2, 2, 1, 0]
    assert soil["mean_confidence"] == pytest.approx(0.5)
    assert crop["mean_confidence"] == pytest.approx((1.0 + 4 * 0.8) / 5)
    assert weed["mean_confidence"] is None
    assert track["mean_confidence"] is None
    confidence = {i["name"]: i["confidence"] for group in page["galleries"] for i in group["images"]}
    assert confidence == {"a": pytest.approx(0.625), "b": pytest.approx(0.8), "c": None}


def test_a_part_without_its_label_maps_is_no_part_of_the_page(tmp_path: Path) -> None:
    images = [Image(uri=f"file:///{i}.jpg", label_map=np.zeros((4, 4), np.uint8)) for i in range(6)]
    write_store(tmp_path, images, CLASSES, per_part=3)
    sorted((tmp_path / "label_maps" / "recipe=a1b2c3d4").iterdir())[0].unlink()
    assert page_data(report(Report(sink=str(tmp_path))))["num_images"] == 3


def test_rejects_are_counted_by_reason_with_examples(sink: Path) -> None:
    truncated, forbidden = page_data(report(Report(sink=str(sink), num_images=0)))["rejects"]
    assert (truncated["stage"], truncated["kind"], truncated["num_images"]) == ("decode", "truncated", 7)
    assert len(truncated["examples"]) == 5
    assert truncated["examples"][0] == {"uri": f"file:///in/{HOSTILE}0.jpg", "detail": HOSTILE}
    assert forbidden["examples"] == [{"uri": "s3://bucket/secret.jpg", "detail": "403"}]


def test_originals_are_found_in_shards(tmp_path: Path) -> None:
    label_map = draw(tmp_path / "a.png", 0)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "dir/a.png")
    image = Image(uri=f"file://{tmp_path}/x.tar#dir/a.png", label_map=label_map)
    write_store(tmp_path / "sink", [image], CLASSES)
    (group,) = page_data(report(Report(sink=str(tmp_path / "sink"))))["galleries"]
    assert group["images"][0]["name"] == "a"
    assert group["images"][0]["photo"].startswith("data:image/jpeg;base64,")


def test_originals_that_changed_are_not_shown(tmp_path: Path) -> None:
    names = ("gone", "smaller", "larger", "broken")
    images = [Image(uri=f"file://{tmp_path}/{n}.png", label_map=draw(tmp_path / f"{n}.png", 0)) for n in names]
    (tmp_path / "gone.png").unlink()
    draw(tmp_path / "smaller.png", 0, (20, 10))
    draw(tmp_path / "larger.png", 0, (800, 600))
    (tmp_path / "broken.png").write_bytes(b"not a photograph")
    write_store(tmp_path / "sink", images, CLASSES)
    page = page_data(report(Report(sink=str(tmp_path / "sink"))))
    shown = {image["name"]: image for group in page["galleries"] for image in group["images"]}
    assert all(image["photo"] is None and image["label_map"] for image in shown.values())
    assert "missing" in shown["gone"]["missing"]
    assert "changed: 10×20 pixels now, 60×80 when labelled" in shown["smaller"]["missing"]
    assert "changed" in shown["larger"]["missing"]
    assert "not an image" in shown["broken"]["missing"]


def test_the_page_stays_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    PillowImage.fromarray(rng.integers(0, 255, (480, 640, 3), np.uint8)).save(tmp_path / "noise.jpg", quality=70)
    images = []
    for i in range(24):
        (tmp_path / f"{i}.jpg").hardlink_to(tmp_path / "noise.jpg")
        blocks = rng.integers(0, 4, (60, 80), np.uint8).repeat(8, 0).repeat(8, 1)
        images.append(Image(uri=f"file://{tmp_path}/{i}.jpg", label_map=blocks))
    write_store(tmp_path / "sink", images, CLASSES)
    assert Path(report(Report(sink=str(tmp_path / "sink")))).stat().st_size < 10e6


def test_more_than_256_classes(tmp_path: Path) -> None:
    classes = Classes(tuple(f"class {i}" for i in range(400)), ignore_index=65535)
    label_map = np.arange(399, dtype=np.uint16).reshape(19, 21)
    write_store(tmp_path / "sink", [Image(uri="file:///a.tif", label_map=label_map)], classes)
    page = page_data(report(Report(sink=str(tmp_path / "sink"), export=str(tmp_path / "out"))))
    assert page["galleries"][0]["images"][0]["label_map"].startswith("data:image/png;base64,")
    assert len(list((tmp_path / "out").glob("*/*.png"))) == 399


def test_one_image(sink: Path, tmp_path: Path) -> None:
    everything = page_data(report(Report(sink=str(sink))))
    image_id = everything["galleries"][0]["images"][0]["image_id"]
    path = report(Report(sink=str(sink), image_id=image_id, export=str(tmp_path / "out")))
    assert path == f"{sink}/image-{image_id}.html"
    page = page_data(path)
    (group,) = page["galleries"]
    assert [image["image_id"] for image in group["images"]] == [image_id]
    assert page["title"] == everything["galleries"][0]["images"][0]["name"]
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
    with pytest.raises(SinkError, match="no image nonsense"):
        report(Report(sink=str(sink), image_id="nonsense"))
    with pytest.raises(SinkError, match="rejected, so there is no label map: fetch: forbidden: 403"):
        report(Report(sink=str(sink), image_id="r7"))


def test_export_writes_colours_and_masks_that_never_overwrite_each_other(tmp_path: Path) -> None:
    classes = Classes(("a/b", "a_b", "../c", "none"), CLASSES.palette)
    images = [
        Image(uri=f"file:///{name}", label_map=np.random.default_rng(i).integers(0, 3, (6, 8)).astype(np.uint8))
        for i, name in enumerate(("x/photo.jpg", "y/photo.jpg", "x/photo.png", "z/..", f"z/{'long' * 60}.jpg"))
    ]
    write_store(tmp_path / "sink", images, classes)
    report(Report(sink=str(tmp_path / "sink"), export=str(tmp_path / "out" / "deep")))
    pngs = sorted((tmp_path / "out" / "deep").glob("*.png"))
    assert len(pngs) == len(images)
    assert {path.name for path in tmp_path.iterdir()} == {"sink", "out"}
    for png in pngs:
        label_map = decode_png(png.read_bytes())
        assert any(np.array_equal(label_map, image.label_map) for image in images)
        masks = sorted(png.with_suffix("").iterdir())
        assert [mask.name for mask in masks] == ["000-a_b.png", "001-a_b.png", "002-.._c.png"]
        for class_id, mask in enumerate(masks):
            with PillowImage.open(mask) as opened:
                np.testing.assert_array_equal(np.asarray(opened.convert("L")) == 255, label_map == class_id)


def test_the_run_is_the_newest_of_the_recipe_or_the_given_one(tmp_path: Path) -> None:
    image = Image(uri="file:///a.jpg", label_map=np.zeros((4, 4), np.uint8))
    write_store(tmp_path, [image], CLASSES, run_id="20261122T000000Z-aa", recipe="one")
    write_store(tmp_path, [], CLASSES, run_id="20261123T000000Z-bb", recipe="one", status="interrupted")
    write_store(tmp_path, [image], CLASSES, run_id="20261121T000000Z-cc", recipe="two")
    page = page_data(report(Report(sink=str(tmp_path))))
    assert page["run"]["run_id"] == "20261123T000000Z-bb"
    assert [run["run_id"] for run in page["runs"]] == ["20261123T000000Z-bb", "20261122T000000Z-aa"]
    assert page_data(report(Report(sink=str(tmp_path), recipe="two")))["run"]["run_id"] == "20261121T000000Z-cc"
    assert page_data(report(Report(sink=str(tmp_path), run="20261122T000000Z-aa")))["run"]["status"] == "finished"
    with pytest.raises(SinkError, match=r"no run 2025; the newest are 20261123T000000Z-bb, "):
        report(Report(sink=str(tmp_path), run="2025"))


def test_nights_add_up_their_runs_and_show_those_without_any(tmp_path: Path) -> None:
    image = Image(uri="file:///a.jpg", label_map=np.zeros((4, 4), np.uint8))
    for run_id, started, labelled, rejected, rate in [
        ("aa", "2026-11-19T22:00:00+00:00", 100, 2, 10.0),
        ("bb", "2026-11-19T23:59:00+00:00", 50, 0, 40.0),
        ("cc", "2026-11-22T01:00:00+00:00", 0, 0, None),
    ]:
        counts = {"seen": labelled + rejected, "labelled": labelled, "rejected": rejected, "present": 0}
        seconds = {"total": 20, "start": 5, "steady": 10}
        run: dict[str, Any] = {"started": started, "counts": counts, "seconds": seconds, "images_per_second": rate}
        write_store(tmp_path, [image], CLASSES, run_id=run_id, **run)
    none = {"num_runs": 0, "labelled": 0, "rejected": 0, "images_per_second": None}
    assert page_data(report(Report(sink=str(tmp_path))))["nights"] == [
        {"day": "2026-11-19", "num_runs": 2, "labelled": 150, "rejected": 2, "images_per_second": 25.0},
        {"day": "2026-11-20"} | none,
        {"day": "2026-11-21"} | none,
        {"day": "2026-11-22"} | none | {"num_runs": 1},
    ]


def test_a_store_without_runs_still_has_a_page(tmp_path: Path) -> None:
    image = Image(uri="file:///a.jpg", label_map=np.zeros((4, 4), np.uint8))
    write_store(tmp_path, [image], CLASSES, run_id=None)
    assert page_data(report(Report(sink=str(tmp_path))))["run"] is None


def test_what_cannot_be_reported(tmp_path: Path) -> None:
    with pytest.raises(SinkError, match="there is no label store"):
        report(Report(sink=str(tmp_path / "none")))
    with pytest.raises(SinkError, match="not a label store"):
        report(Report(sink=str(tmp_path)))
    write_store(tmp_path / "sink", [], CLASSES)
    with pytest.raises(SinkError, match="nothing to show"):
        report(Report(sink=str(tmp_path / "sink")))
    with pytest.raises(SettingsError, match="--html"):
        Report(sink="s3://bucket/labels")
    with pytest.raises(SettingsError, match="--num-images -1"):
        Report(sink="sink", num_images=-1)


def test_a_page_that_cannot_be_written(sink: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        report(Report(sink=str(sink), html=str(tmp_path / "file" / "page.html")))


def test_another_store_takes_the_page(sink: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    assert report(Report(sink=str(sink), html="memory://pages/report.html")) == "memory://pages/report.html"
    assert fsspec.filesystem("memory").cat_file("/pages/report.html").startswith(b"<!doctype html>")


# In a browser.

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Opens a page file in headless Chromium, and fails at its end where it asked the network or complained."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium; on Debian: apt install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    arguments += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    complaints: list[str] = []
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=arguments)

        def requested(url: str) -> None:
            if not url.startswith(("file://", "data:")):
                complaints.append(url)

        def open_page(path: str | Path, width: int = 1280, height: int = 900, **options: Any) -> Any:
            context = launched.new_context(viewport={"width": width, "height": height}, **options)
            page = context.new_page()
            page.on("console", lambda message: complaints.append(f"console: {message.text}"))
            page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
            page.on("request", lambda request: requested(request.url))
            page.goto(f"file://{path}")
            return page

        open_page.complaints = complaints  # type: ignore[attr-defined]
        yield open_page
        launched.close()


@pytest.fixture
def open_page(browser: Open) -> Iterator[Open]:
    """As `browser`, for one test."""
    browser.complaints.clear()  # type: ignore[attr-defined]
    yield browser
    assert browser.complaints == []  # type: ignore[attr-defined]


def test_the_page_in_a_browser(sink: Path, open_page: Open) -> None:
    page = open_page(report(Report(sink=str(sink))))
    assert page.title() == "unet_resnet18 · segray report"
    assert page.locator("h1").inner_text() == "unet_resnet18"
    assert page.locator(".sum dd").all_inner_texts() == ["38", "30", "0", "8"]
    assert page.locator("tr.class th").count() == 4
    assert page.locator("figure").count() == 24
    confidences = [float(text) for text in page.locator("figure .name span").all_inner_texts()]
    assert confidences[:12] == sorted(confidences[:12]) == [round(0.6 + i / 100, 2) for i in range(12)]
    assert min(confidences[12:]) > confidences[11]
    assert page.locator("svg[role=img] polyline").count() == 1
    images = page.locator("img")
    assert all(images.nth(i).get_attribute("alt") for i in range(images.count()))
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")


def test_texts_are_texts(sink: Path, tmp_path: Path, open_page: Open) -> None:
    path = tmp_path / "a<img src=x onerror=alert(1)>.jpg"
    classes = Classes((f"</script>{HOSTILE}", "<b>crop</b>", "weed", "track"))
    write_store(tmp_path / "other", [Image(uri=f"file://{path}", label_map=draw(path, 0))], classes)
    page = open_page(report(Report(sink=str(tmp_path / "other"))))
    assert page.locator("figure .name b").inner_text() == "a<img src=x onerror=alert(1)>"
    assert page.locator("tr.class th").first.inner_text().strip().endswith(HOSTILE)
    page = open_page(report(Report(sink=str(sink))))
    page.locator("details.reject summary").first.click()
    assert page.locator("details.reject code").first.inner_text() == f"file:///in/{HOSTILE}0.jpg"
    assert page.locator("details.reject li").nth(5).inner_text() == "and 2 more, in the table rejects"


def test_the_slider_sets_the_opacity_of_every_overlay(sink: Path, open_page: Open) -> None:
    page = open_page(report(Report(sink=str(sink), num_images=4)))
    overlays = "[...document.querySelectorAll('[data-view=overlay] .map')].map((map) => getComputedStyle(map).opacity)"
    assert set(page.evaluate(overlays)) == {"0.5"}
    page.get_by_role("slider", name="Overlay").focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert set(page.evaluate(overlays)) == {"0.7"}
    assert page.locator("output").inner_text() == "70 %"
    page.get_by_role("slider", name="Overlay").fill("0")
    assert set(page.evaluate(overlays)) == {"0"}


def test_the_keyboard_alone(sink: Path, open_page: Open) -> None:
    page = open_page(report(Report(sink=str(sink))))
    views = page.locator("button.view")

    def focused() -> int:
        index = page.evaluate("[...document.querySelectorAll('button.view')].indexOf(document.activeElement)")
        return int(index)

    page.get_by_role("slider", name="Overlay").focus()
    page.keyboard.press("Tab")
    while focused() < 0:
        page.keyboard.press("Tab")
    assert focused() == 0
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    opacity = "getComputedStyle(document.activeElement.querySelector('.map')).opacity"
    seen = []
    for key in ("Space", "Enter", "Space"):
        seen.append((views.first.get_attribute("data-view"), page.evaluate(opacity)))
        page.keyboard.press(key)
    assert seen == [("overlay", "0.5"), ("image", "0"), ("label map", "1")]
    assert views.first.get_attribute("data-view") == "overlay"
    assert "shown as overlay" in (views.first.get_attribute("aria-label") or "")
    page.keyboard.press("ArrowRight")
    assert focused() == 1
    page.keyboard.press("ArrowLeft")
    assert focused() == 0
    page.keyboard.press("ArrowLeft")
    assert focused() == 0
    page.keyboard.press("ArrowDown")
    assert focused() > 1
    page.keyboard.press("ArrowUp")
    assert focused() <= 1
    page.keyboard.press("End")
    assert focused() == views.count() - 1
    page.keyboard.press("Home")
    assert focused() == 0
    assert views.nth(1).get_attribute("data-view") == "overlay"


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone(sink: Path, open_page: Open, width: int) -> None:
    write_store(
        sink, [], CLASSES, run_id="20261120T000000Z-ff", rejects=[("s3://b/" + "long" * 40, "fetch", "gone: 404")]
    )
    page = open_page(report(Report(sink=str(sink))), width, 700, is_mobile=True, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for details in page.locator("details").all():
        details.evaluate("(node) => { node.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    first = page.locator("button.view").first
    first.tap()
    assert first.get_attribute("data-view") == "image"


def test_a_lost_original_says_so(sink: Path, open_page: Open) -> None:
    page = open_page(report(Report(sink=str(sink), num_images=30)))
    lost = page.locator("figure", has_text="The original cannot be shown")
    assert lost.count() == 1
    assert lost.locator("b").inner_text() == "13"
    assert lost.locator("button").count() == 0
    assert lost.locator("img").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(sink: Path, open_page: Open, scheme: str) -> None:
    """Text reaches 4.5 to 1, as WCAG AA asks."""
    page = open_page(report(Report(sink=str(sink))), color_scheme=scheme)

    def luminance(colour: str) -> float:
        channels = np.array([int(c) for c in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    ground = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (ground > 0.5) == (scheme == "light")
    for selector in ("body", ".eyebrow", ".soft", ".status", "th", "figcaption", ".missing", "footer", ".chart"):
        if page.locator(selector).count():
            text = luminance(page.locator(selector).first.evaluate("(node) => getComputedStyle(node).color"))
            low, high = sorted((text, ground))
            assert (high + 0.05) / (low + 0.05) >= 4.5, selector


def test_counts_that_do_not_add_up_say_so(sink: Path, open_page: Open) -> None:
    counts = {"seen": 40, "labelled": 30, "rejected": 8, "present": 0}
    write_store(sink, [], CLASSES, run_id="20261122T090000Z-ff", counts=counts, throughput=[], images_per_second=None)
    page = open_page(report(Report(sink=str(sink))))
    assert "do not add up: 2 images are unaccounted for" in page.locator("main").inner_text()


def test_one_image_in_a_browser(sink: Path, open_page: Open) -> None:
    image_id = page_data(report(Report(sink=str(sink))))["galleries"][0]["images"][0]["image_id"]
    page = open_page(report(Report(sink=str(sink), image_id=image_id)))
    assert page.locator("figure").count() == 1
    assert page.locator(".single details").first.get_attribute("open") is not None
    box = page.locator("button.view").bounding_box()
    assert box is not None
    assert box["width"] / box["height"] == pytest.approx(WIDTH / HEIGHT, rel=0.01)


def test_pages_without_run_or_images(tmp_path: Path, open_page: Open) -> None:
    image = Image(uri="file:///a.jpg", label_map=np.zeros((4, 4), np.uint8), confidence=None)
    write_store(tmp_path / "a", [image], CLASSES, run_id=None)
    page = open_page(report(Report(sink=str(tmp_path / "a"))))
    assert "No run of this recipe is recorded" in page.locator("main").inner_text()
    write_store(tmp_path / "b", [], CLASSES, rejects=[("file:///a.jpg", "decode", "empty: the file has 0 bytes")])
    page = open_page(report(Report(sink=str(tmp_path / "b"))))
    assert "1 image could not be labelled" in page.locator("main").inner_text()


def test_embedded_images_are_what_was_labelled(tmp_path: Path) -> None:
    label_map = draw(tmp_path / "a.png", 3)
    write_store(tmp_path / "sink", [Image(uri=f"file://{tmp_path}/a.png", label_map=label_map)], CLASSES)
    (group,) = page_data(report(Report(sink=str(tmp_path / "sink"))))["galleries"]
    embedded = base64.b64decode(group["images"][0]["label_map"].partition(",")[2])
    with PillowImage.open(io.BytesIO(embedded)) as opened:
        np.testing.assert_array_equal(
            np.asarray(opened.convert("RGB")), np.asarray(CLASSES.palette, np.uint8)[label_map]
        )


@pytest.fixture
def scene_sink(tmp_path: Path) -> Path:
    """A scene of 40×50 pixels in windows of 32, of which the last twenty columns hold no data."""
    samples = np.random.default_rng(0).integers(1000, 3000, (3, 40, 50)).astype(np.uint16)
    samples[:, :, 30:] = 0
    raster = write_raster(tmp_path / "scenes/field.tif", samples, ("red", "green", "blue"), nodata=0)
    label_map = np.repeat(np.array([0, 1, 255], np.uint8), [10, 20, 20])[None].repeat(40, 0)
    images = windows(raster, label_map, 32, pixel_area_m2=900.0)
    write_store(tmp_path / "labels", images, CLASSES, scenes={"size": 32})
    return tmp_path / "labels"


def test_windows_of_scenes_are_shown_themselves(scene_sink: Path) -> None:
    page = page_data(report(Report(sink=str(scene_sink))))
    shown = {image["name"]: image for group in page["galleries"] for image in group["images"]}
    assert sorted(shown) == ["field at 0, 0", "field at 0, 32"]
    window = shown["field at 0, 0"]
    assert window["missing"] is None
    photo = np.asarray(PillowImage.open(io.BytesIO(base64.b64decode(window["photo"].partition(",")[2]))))
    assert photo.shape == (32, 32, 3)
    assert photo[:, :29].mean() > 100
    assert photo[:, 31].max() < 60, "no data is black"
    west, south, east, north = window["bounds"]
    assert 14.9 < west < east < 15.1
    assert 48.7 < south < north < 48.8
    assert [(c["name"], c["fraction"]) for c in window["classes"]] == [("crop", 2 / 3), ("soil", 1 / 3)]


def test_areas_of_classes_are_in_hectares_and_images_have_none(scene_sink: Path, sink: Path) -> None:
    classes = page_data(report(Report(sink=str(scene_sink))))["classes"]
    assert [c["hectares"] for c in classes[:3]] == pytest.approx([400 * 0.09, 800 * 0.09, 0])
    assert {c["hectares"] for c in page_data(report(Report(sink=str(sink))))["classes"] if c["num_pixels"]} == {None}


def test_a_window_whose_scene_has_changed_is_shown_as_its_label_map(scene_sink: Path) -> None:
    raster = scene_sink.parent / "scenes/field.tif"
    write_raster(raster, np.ones((3, 20, 20), np.uint8), ("red", "green", "blue"))
    page = page_data(report(Report(sink=str(scene_sink), num_images=1)))
    [image] = page["galleries"][0]["images"]
    assert (image["photo"], image["missing"]) == (
        None,
        "changed: the scene has another grid now than when it was labelled",
    )


def test_a_report_of_images_does_not_import_rasterio(sink: Path) -> None:
    code = (
        "import sys; from segray.report import Report, report\n"
        f"report(Report(sink={str(sink)!r}))\n"
        "sys.exit('rasterio' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
