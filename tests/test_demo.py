import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from segray.classes import Classes
from segray.decode import decode
from segray.demo import CLASSES, Draw, draw, encoded, scene
from segray.errors import SettingsError, SinkError
from segray.labelmap import decode_png

SEEDS = range(40, 52)


def test_a_seed_is_one_scene_and_another_seed_another() -> None:
    image, target = scene(7)
    again, target_again = scene(7)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(target, target_again)
    other, _ = scene(8)
    assert image.shape != other.shape or (image != other).mean() > 0.5


def test_a_target_fits_its_image_and_all_classes_occur() -> None:
    sizes, ids = set(), set()
    for seed in SEEDS:
        image, target = scene(seed)
        assert image.dtype == target.dtype == np.uint8
        assert image.shape == (*target.shape, 3)
        assert target.max() < len(CLASSES)
        sizes.add(target.shape)
        ids |= set(np.unique(target).tolist())
    assert ids == set(range(len(CLASSES)))
    assert len(sizes) > 1, "the labelling job is shown mixed sizes"


def test_the_target_is_where_the_plants_are() -> None:
    greenness: dict[bool, list[float]] = {True: [], False: []}
    for seed in SEEDS:
        image, target = scene(seed)
        excess = 2.0 * image[..., 1] - image[..., 0] - image[..., 2]
        is_plant = np.isin(target, (1, 2))
        for of_plants in (True, False):
            greenness[of_plants].append(float(np.median(excess[is_plant == of_plants])))
    assert min(greenness[True]) > 15
    assert max(greenness[False]) < 15


def test_colour_alone_does_not_tell_crop_from_weed() -> None:
    pixels: dict[int, list[np.ndarray]] = {1: [], 2: []}
    for seed in SEEDS:
        image, target = scene(seed)
        hues = image[..., 0] / (image.sum(axis=2) + 1.0)
        for class_id, found in pixels.items():
            found.append(hues[target == class_id])
    crop, weed = (np.concatenate(found) for found in pixels.values())
    thresholds = np.linspace(0, 1, 101)[:, None]
    balanced = [((weed > t).mean() + (crop <= t).mean()) / 2 for t in thresholds]
    assert 0.5 < max(balanced) < 0.9


def test_the_formats_hold_the_same_bytes(tmp_path: Path) -> None:
    num_scenes, first_seed = 5, 300
    for form in ("loose", "tar", "parquet"):
        sink = str(tmp_path / form)
        draw(Draw(sink=sink, num_scenes=num_scenes, first_seed=first_seed, format=form, shard_scenes=3))
    expected = {name: (image, target) for name, image, target in map(encoded, range(300, 305))}

    loose = {
        path.stem: (path.read_bytes(), (tmp_path / "loose/targets" / f"{path.stem}.png").read_bytes())
        for path in (tmp_path / "loose/images").iterdir()
    }
    members: dict[str, bytes] = {}
    for shard in sorted((tmp_path / "tar").glob("shard-*.tar")):
        with tarfile.open(shard) as archive:
            for entry in archive:
                file = archive.extractfile(entry)
                assert file is not None
                members[entry.name] = file.read()
    tar = {
        name.removesuffix(".jpg"): (members[name], members[name.replace(".jpg", ".target.png")])
        for name in members
        if name.endswith(".jpg")
    }
    tables = [pq.read_table(shard) for shard in sorted((tmp_path / "parquet").glob("shard-*.parquet"))]
    parquet = {row["name"]: (row["image"], row["target"]) for table in tables for row in table.to_pylist()}
    assert [table.num_rows for table in tables] == [3, 2]
    assert len(members) == 2 * num_scenes
    assert loose == tar == parquet == expected


def test_what_is_written_decodes_to_the_scene(tmp_path: Path) -> None:
    draw(Draw(sink=str(tmp_path), num_scenes=2, first_seed=11))
    for seed in (11, 12):
        image, target = scene(seed)
        seen = decode((tmp_path / f"images/scene-{seed:07d}.jpg").read_bytes(), 10**6)
        assert np.abs(seen.astype(int) - image).mean() < 6
        np.testing.assert_array_equal(decode_png((tmp_path / f"targets/scene-{seed:07d}.png").read_bytes()), target)


def test_a_shard_is_the_same_bytes_whenever_it_is_drawn(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        draw(Draw(sink=str(tmp_path / folder), num_scenes=2, format="tar"))
    a, b = ((tmp_path / folder / "shard-000000.tar").read_bytes() for folder in ("a", "b"))
    assert a == b
    assert tarfile.open(fileobj=io.BytesIO(a)).getnames()[:2] == ["scene-1000000.jpg", "scene-1000000.target.png"]


def test_the_classes_file_reads_as_the_classes_and_tells_the_command(tmp_path: Path) -> None:
    job = Draw(sink=str(tmp_path), num_scenes=1)
    draw(job)
    assert Classes.read(str(tmp_path / "classes.json")) == CLASSES
    assert json.loads((tmp_path / "classes.json").read_text())["command"] == job.command()


def test_the_command_line_draws(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "segray.demo", str(tmp_path / "sink"), "--num-scenes", "1", "--format", "parquet"]
    subprocess.run(command, check=True, timeout=60)
    (name,) = pq.read_table(tmp_path / "sink/shard-000000.parquet")["name"].to_pylist()
    assert name == "scene-1000000"


@pytest.mark.parametrize("settings", [{"num_scenes": 0}, {"first_seed": -1}, {"shard_scenes": 0}])
def test_numbers_out_of_bounds_are_refused(settings: dict[str, int]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(SettingsError, match=f"--{name.replace('_', '-')} {value}"):
        Draw(sink="somewhere", **settings)  # type: ignore[arg-type]


def test_a_sink_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SinkError, match="file"):
        draw(Draw(sink=str(tmp_path / "file"), num_scenes=1))


def test_drawing_needs_neither_torch_nor_ray() -> None:
    code = "import sys, segray.demo; sys.exit(any(name in sys.modules for name in ('torch', 'ray')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
