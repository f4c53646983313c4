"""What all readers of data sets share, and CamVid, the plainest of them. Other files have the other kinds."""

import io
import pickle
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import fsspec
import numpy as np
import pytest
import s3fs
from PIL import Image

from segray.datasets import KINDS, DataSet, Pair, open_dataset, read
from segray.errors import Reject, RunError, SettingsError, SourceError
from tests.conftest import CAMVID_CLASSES
from tests.s3 import BUCKET, Server


def encoded(pixels: object, palette: Sequence[Sequence[int]] = ()) -> bytes:
    """A PNG: grey or palette of (height, width), RGB of (height, width, 3)."""
    image = Image.fromarray(np.array(pixels, np.uint8))
    if palette:
        image.putpalette(np.array(palette, np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def photo(height: int, width: int, suffix: str = ".png") -> bytes:
    """An image of noise, of another size or kind."""
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, {".png": "PNG", ".jpg": "JPEG"}[suffix])
    return buffer.getvalue()


def plant(root: Path, files: Mapping[str, bytes | str]) -> str:
    """Writes a tree and returns its root."""
    for path, content in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(root)


def places(dataset: DataSet) -> list[tuple[str, str]]:
    """Split and name of each pair."""
    return [(pair.split, pair.name) for pair in dataset.pairs]


def targets(dataset: DataSet) -> dict[tuple[str, str], np.ndarray]:
    """The target of each pair, through `read`."""
    found = {}
    for pair in dataset.pairs:
        data, image, target = read(pair, pickle.loads(pickle.dumps(dataset.to_target)))
        assert image.shape == (*target.shape, 3)
        assert image.dtype == np.uint8
        assert data == fsspec.open(pair.image).open().read()
        found[pair.split, pair.name] = target
    return found


def reject(dataset: DataSet, name: str) -> Reject:
    """That of the pair of this name."""
    [pair] = (pair for pair in dataset.pairs if pair.name == name)
    with pytest.raises(Reject) as caught:
        read(pair, dataset.to_target)
    assert "\n" not in caught.value.reason
    return caught.value


def camvid_tree(root: Path, splits: Iterable[str] = ("train", "val", "test")) -> str:
    for split in splits:
        files: dict[str, bytes | str] = {f"{split}/{split}_{i}.png": photo(2, 3 + i) for i in range(2)}
        files |= {f"{split}annot/{split}_{i}.png": encoded([[i, *range(9, 11 + i)], [0] * (3 + i)]) for i in range(2)}
        plant(root, files)
    return str(root)


def test_camvid_is_read_to_the_pixel_and_its_void_becomes_255(tmp_path: Path) -> None:
    dataset = open_dataset("camvid", camvid_tree(tmp_path))
    assert places(dataset) == [(s, f"{s}_{i}") for s in ("test", "train", "val") for i in range(2)]
    for (_, name), target in targets(dataset).items():
        assert target.dtype == np.uint8
        assert target.tolist() == ([[0, 9, 10], [0] * 3] if name.endswith("0") else [[1, 9, 10, 255], [0] * 4])
    assert dataset.classes.names == CAMVID_CLASSES.names
    assert dataset.classes.ignore_index == 255
    assert dataset.classes.palette[3] == (128, 64, 128)
    assert len(set(dataset.classes.palette)) == 11


def test_real_camvid_is_whole(camvid: Path) -> None:
    dataset = open_dataset("camvid", str(camvid))
    splits = [pair.split for pair in dataset.pairs]
    assert (splits.count("train"), splits.count("val"), len(splits)) == (367, 101, 468)
    for pair in dataset.pairs[::50]:
        _, image, target = read(pair, dataset.to_target)
        stored = np.array(Image.open(camvid / f"{pair.split}annot" / f"{pair.name}.png"))
        assert image.shape == (360, 480, 3)
        np.testing.assert_array_equal(target, np.where(stored == 11, 255, stored))


def test_a_data_set_in_object_storage_is_the_same(tmp_path: Path, s3: Server) -> None:
    local = open_dataset("camvid", camvid_tree(tmp_path))
    fs = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
    fs.put(str(tmp_path), f"{BUCKET}/camvid", recursive=True)
    stored = open_dataset("camvid", f"s3://{BUCKET}/camvid/")
    assert places(stored) == places(local)
    assert stored.pairs[0].image == f"s3://{BUCKET}/camvid/test/test_0.png"
    for pair, other in zip(stored.pairs, local.pairs, strict=True):
        for mine, its in zip(read(pair, stored.to_target), read(other, local.to_target), strict=True):
            np.testing.assert_array_equal(mine, its)
    fs.rm(f"{BUCKET}/camvid/valannot/val_1.png")
    again = open_dataset("camvid", f"s3://{BUCKET}/camvid")
    assert places(again) == places(local)
    assert f"s3://{BUCKET}/camvid/valannot/val_1.png" in reject(again, "val_1").detail
    with pytest.raises(SourceError, match=f"s3://{BUCKET}/nothing: there is no train with trainannot"):
        open_dataset("camvid", f"s3://{BUCKET}/nothing")


def test_splits_that_were_not_downloaded_are_left_out(tmp_path: Path) -> None:
    assert {s for s, _ in places(open_dataset("camvid", camvid_tree(tmp_path, ["val"])))} == {"val"}
    plant(tmp_path, {"trainannot/a.png": encoded([[1]])})
    assert {s for s, _ in places(open_dataset("camvid", str(tmp_path)))} == {"val"}


@pytest.mark.parametrize(("gone", "there"), [("val/val_0.png", "valannot"), ("valannot/val_0.png", "val/")])
def test_a_missing_counterpart_costs_its_pair_alone_and_is_named(tmp_path: Path, gone: str, there: str) -> None:
    root = Path(camvid_tree(tmp_path, ["val"]))
    (root / gone).unlink()
    dataset = open_dataset("camvid", str(root))
    assert places(dataset) == [("val", "val_0"), ("val", "val_1")]
    caught = reject(dataset, "val_0")
    assert (caught.stage, caught.kind) == ("fetch", "missing")
    name = f"{root}/{gone}".replace("val_0.png", "val_0.*" if gone.startswith("val/") else "val_0.png")
    assert name in caught.detail
    read(dataset.pairs[1], dataset.to_target)


def test_a_target_of_another_size_is_named_with_both_sizes(tmp_path: Path) -> None:
    dataset = open_dataset(
        "camvid", plant(tmp_path, {"val/a.png": photo(4, 6), "valannot/a.png": encoded([[0] * 4] * 6)})
    )
    caught = reject(dataset, "a")
    assert (caught.stage, caught.kind) == ("decode", "size mismatch")
    assert f"{tmp_path}/valannot/a.png: the target has 6×4 pixels" in caught.detail
    assert f"{tmp_path}/val/a.png 4×6" in caught.detail


def test_an_id_of_no_class_is_named_with_its_place(tmp_path: Path) -> None:
    tree = {"val/a.png": photo(2, 3), "valannot/a.png": encoded([[0, 1, 2], [3, 12, 12]])}
    caught = reject(open_dataset("camvid", plant(tmp_path, tree)), "a")
    assert (caught.stage, caught.kind) == ("decode", "unknown id")
    assert f"{tmp_path}/valannot/a.png: the id 12 in row 1, column 1 stands for no class" in caught.detail
    assert "2 of 6 pixels" in caught.detail


@pytest.mark.parametrize(("path", "kind"), [("val/a.png", "truncated"), ("valannot/a.png", "unreadable target")])
def test_a_damaged_file_is_named(tmp_path: Path, path: str, kind: str) -> None:
    tree: dict[str, bytes | str] = {"val/a.png": photo(20, 30), "valannot/a.png": encoded([[0] * 30] * 20)}
    whole = tree[path]
    assert isinstance(whole, bytes)
    tree[path] = whole[:-30]
    caught = reject(open_dataset("camvid", plant(tmp_path, tree)), "a")
    assert (caught.stage, caught.kind) == ("decode", kind)
    assert f"{tmp_path}/{path}" in caught.detail


def test_targets_in_colour_where_ids_belong_are_rejects(tmp_path: Path) -> None:
    tree = {"val/a.png": photo(2, 3), "valannot/a.png": photo(2, 3)}
    caught = reject(open_dataset("camvid", plant(tmp_path, tree)), "a")
    assert caught.kind == "unreadable target"
    assert f"{tmp_path}/valannot/a.png" in caught.detail


def test_a_store_that_refuses_is_no_reject(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    s3fs.S3FileSystem.clear_instance_cache()  # which keeps credentials
    pair = Pair(name="a", split="train", image="s3://segray/a.jpg", target=None)
    try:
        with pytest.raises(RunError, match=r"s3://segray/a\.jpg: the store does not give it"):
            read(pair, lambda pair, data, size: np.zeros(size, np.uint8))
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_names_are_unique_and_fit_a_shard_whatever_files_are_called(tmp_path: Path) -> None:
    names = ["sub/a", "b b", "b_b", "b.b", "ü", "img-1", "IMG(1)", "IMG[1]", "a#b", "50%"]
    for name in names:
        plant(tmp_path, {f"val/{name}.png": photo(1, 2), f"valannot/{name}.png": encoded([[3, 4]])})
    plant(tmp_path, {"val/.hidden.png": b"", "val/.ipynb_checkpoints/a.png": b"", "val/Thumbs.db": b""})
    dataset = open_dataset("camvid", str(tmp_path))
    safe = [pair.name for pair in dataset.pairs]
    assert len(set(safe)) == len(names)
    assert {"sub/a", "b_b", "img-1"} < set(safe)
    assert all(character.isalnum() or character in "_/-" for name in safe for character in name)
    assert " ".join(safe).isascii()
    assert [target.tolist() for target in targets(dataset).values()] == [[[3, 4]]] * len(names)


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    tree = {"val/a.png": photo(1, 2), "val/a.JPG": photo(1, 2, ".jpg"), "valannot/a.png": encoded([[0, 0]])}
    with pytest.raises(SourceError, match=r"val/a\.JPG and .*val/a\.png have the same name"):
        open_dataset("camvid", plant(tmp_path, tree))


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("empty", [True, False])
def test_a_layout_that_is_not_there_is_refused_with_what_it_should_be(tmp_path: Path, kind: str, empty: bool) -> None:
    source = tmp_path / "given"
    if not empty:
        plant(source, {"readme.txt": "nothing of it"})
    with pytest.raises(SourceError) as caught:
        open_dataset(kind, str(source))
    text = str(caught.value)
    assert text.startswith(f"{source}: there is no ")
    assert ".png" in text.rpartition(";")[2] or ".jpg" in text.rpartition(";")[2]
    assert "\n" not in text


def test_what_open_dataset_does_not_know_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"--dataset pascal: .* choose one of voc, sbd, coco, coco-instances"):
        open_dataset("pascal", "/data")
    with pytest.raises(SettingsError, match="voc has classes of its own"):
        open_dataset("voc", "/data", classes="classes.json")
    with pytest.raises(SourceError, match="nonsense"):
        open_dataset("voc", "nonsense://bucket/voc")


@pytest.mark.parametrize(("kind", "module"), [("sbd", "scipy.io"), ("coco-instances", "pycocotools.mask")])
def test_a_package_that_is_not_installed_is_asked_for(kind: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SettingsError, match=rf"--dataset {kind} needs {module}, .* pip install 'segray\[datasets\]'"):
        open_dataset(kind, "/data")


def test_opening_imports_neither_ray_nor_torch() -> None:
    code = "import sys, segray.datasets; print([m for m in ('ray', 'torch', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_pairs_are_sorted_by_split_and_name_whatever_their_order_was(tmp_path: Path) -> None:
    one, two, three = (Pair(name=n, split=s, image="i", target=None) for s, n in [("a", "2"), ("b", "0"), ("a", "1")])
    dataset = open_dataset("camvid", camvid_tree(tmp_path, ["val"]))
    ordered = DataSet(classes=dataset.classes, pairs=[one, two, three], to_target=dataset.to_target)
    assert ordered.pairs == [three, one, two]
