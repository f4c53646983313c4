import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from segray import bandfile, demo, pairs, retry
from segray.classes import Classes
from segray.demo import CLASSES, Draw
from segray.errors import SourceError
from segray.labelmap import encode_png
from segray.pairs import INDEX, INDEX_NAME, Census, decode_pair, read, read_index, survey, write_index
from segray.retry import ShortRead
from segray.source import filesystem

NUM_SCENES = 6
FIRST_SEED = 40
FORMATS = ["tar", "parquet"]

Pair = tuple[bytes, bytes]


@pytest.fixture(scope="session")
def scenes() -> dict[str, Pair]:
    """The bytes of drawn scenes by their names."""
    drawn = map(demo.encoded, range(FIRST_SEED, FIRST_SEED + NUM_SCENES))
    return {name: (image, target) for name, image, target in drawn}


@pytest.fixture(scope="session", params=["disk", "s3"])
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of shards `tar` and `parquet`, two each of the scenes."""
    if request.param == "disk":
        folder = str(tmp_path_factory.mktemp("pairs"))
    else:
        request.getfixturevalue("s3")
        folder = "s3://segray/pairs-test"
    for form in FORMATS:
        where = f"{folder}/{form}"
        demo.draw(
            Draw(sink=where, num_scenes=NUM_SCENES, first_seed=FIRST_SEED, format=form, shard_scenes=4)  # type: ignore[arg-type]
        )
    return folder


def shards(folder: str, form: str) -> list[str]:
    return [f"{folder}/{form}/shard-{number:06d}.{form}" for number in range(2)]


def in_all(tables: list[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def random_pair(rng: np.random.Generator, classes: Classes, *, void: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    height, width = rng.integers(1, 40, 2)
    dtype = np.uint16 if max(len(classes) - 1, classes.ignore_index) > 255 else np.uint8
    target = rng.integers(0, len(classes), (height, width)).astype(dtype)
    target[rng.random((height, width)) < void] = classes.ignore_index
    return rng.integers(0, 256, (height, width, 3)).astype(np.uint8), target


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            shard.addfile(entry, io.BytesIO(data))
    return str(path)


def write_parquet(path: Path, rows: list[Pair], **options: object) -> str:
    images, targets = zip(*rows, strict=True)
    table = pa.table({"image": pa.array(images, pa.binary()), "target": pa.array(targets, pa.binary())})
    pq.write_table(table, path, **options)
    return str(path)


def assert_equal(ours: Census, theirs: Census) -> None:
    assert ours.num_images == theirs.num_images
    np.testing.assert_array_equal(ours.num_pixels, theirs.num_pixels)
    assert ours.num_void == theirs.num_void
    np.testing.assert_allclose(ours.channel_sum, theirs.channel_sum, rtol=1e-12)
    np.testing.assert_allclose(ours.channel_square_sum, theirs.channel_square_sum, rtol=1e-12)


GOOD_IMAGE = png(np.full((24, 32, 3), 100, np.uint8))
GOOD_TARGET = encode_png(np.ones((24, 32), np.uint8), CLASSES.palette)
GOOD = GOOD_IMAGE, GOOD_TARGET


@pytest.mark.parametrize("form", FORMATS)
def test_a_survey_finds_what_is_in_a_shard(drawn: str, scenes: dict[str, Pair], form: str) -> None:
    tables, censuses = zip(*(survey(shard, CLASSES) for shard in shards(drawn, form)), strict=True)
    index, census = in_all(list(tables)), sum(censuses, Census.zeros(4))
    assert index.schema == INDEX
    rows = index.to_pylist()
    assert [row["name"] for row in rows] == list(scenes)
    assert [(row["image_bytes"], row["target_bytes"]) for row in rows] == [
        (len(image), len(target)) for image, target in scenes.values()
    ]
    assert [row["shard"] for row in rows] == [shards(drawn, form)[place // 4] for place in range(NUM_SCENES)]
    sizes = {shard: filesystem(shard)[0].size(filesystem(shard)[1]) for shard in shards(drawn, form)}
    assert all(row["shard_bytes"] == sizes[row["shard"]] for row in rows)

    assert census.num_images == NUM_SCENES
    images = [np.asarray(Image.open(io.BytesIO(image))).reshape(-1, 3) / 255 for image, _ in scenes.values()]
    targets = [np.asarray(Image.open(io.BytesIO(target))).ravel() for _, target in scenes.values()]
    np.testing.assert_array_equal(census.num_pixels, np.bincount(np.concatenate(targets), minlength=4))
    assert census.num_void == 0
    pixels = np.concatenate(images)
    np.testing.assert_allclose(census.channel_sum, pixels.sum(0), rtol=1e-10)
    np.testing.assert_allclose(census.channel_square_sum, (pixels**2).sum(0), rtol=1e-10)
    mean, std = census.mean_and_std()
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=0, atol=1e-9)
    np.testing.assert_allclose(std, pixels.std(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", FORMATS)
def test_pairs_are_read_in_any_order_and_more_than_once(drawn: str, scenes: dict[str, Pair], form: str) -> None:
    index = in_all([survey(shard, CLASSES)[0] for shard in shards(drawn, form)])
    expected = [
        (f"{shards(drawn, form)[place // 4]}#{name}", *pair) for place, (name, pair) in enumerate(scenes.items())
    ]
    rng = np.random.default_rng(0)
    for order in (range(NUM_SCENES), [5, 0, 5, 4, 1, 0, 0], rng.permutation(NUM_SCENES), [3], []):
        assert read(index.take(pa.array(order, pa.int64()))) == [expected[place] for place in order]


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_read_decodes_to_what_was_surveyed(drawn: str, form: str) -> None:
    index, census = survey(shards(drawn, form)[0], CLASSES)
    again = Census.zeros(4)
    for pair in read(index):
        again += Census.of(*decode_pair(*pair, CLASSES), CLASSES)
    assert_equal(again, census)


def test_rows_of_many_row_groups_are_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(23):
        image, target = random_pair(rng, CLASSES)
        rows.append((png(image), png(target)))
    shard = write_parquet(tmp_path / "shard.parquet", rows, row_group_size=4)
    index, _ = survey(shard, CLASSES)
    assert index["name"].to_pylist() == [str(row) for row in range(23)]
    order = rng.integers(0, 23, 60)
    assert read(index.take(order)) == [(f"{shard}#{row}", *rows[row]) for row in order]


def test_pairs_of_more_shards_than_are_kept_open(tmp_path: Path) -> None:
    num_shards = pairs._OPEN_SHARDS + 5
    rng = np.random.default_rng(0)
    tables, expected = [], {}
    for number in range(num_shards):
        image, target = random_pair(rng, CLASSES)
        shard = write_parquet(tmp_path / f"shard-{number:06d}.parquet", [(png(image), png(target))])
        tables.append(survey(shard, CLASSES)[0])
        expected[number] = (f"{shard}#0", png(image), png(target))
    index = in_all(tables)
    for _ in range(2):
        order = rng.permutation(num_shards)
        assert read(index.take(order)) == [expected[number] for number in order]


def test_a_tar_may_hold_other_things_and_targets_first_and_names_in_folders(tmp_path: Path) -> None:
    members = {
        "README": b"words",
        "a/0001.target.png": GOOD_TARGET,
        "a/0001.png": GOOD_IMAGE,
        "a/0001.json": b"{}",
        "./0002.webp": GOOD_IMAGE,
        "./0002.target.png": GOOD_TARGET,
        f"{'long' * 60}/0003.jpeg": GOOD_IMAGE,
        f"{'long' * 60}/0003.target.png": GOOD_TARGET,
        "0004.txt": b"no pair",
    }
    index, census = survey(write_tar(tmp_path / "shard.tar", members), CLASSES)
    assert index["name"].to_pylist() == ["a/0001", "0002", f"{'long' * 60}/0003"]
    assert census.num_images == 3
    assert all(pair[1:] == GOOD for pair in read(index))


def test_shards_may_end_in_capitals(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "SHARD.TAR", {"a.jpg": GOOD_IMAGE, "a.target.png": GOOD_TARGET})
    parquet = write_parquet(tmp_path / "SHARD.PARQUET", [GOOD])
    for shard in (tar, parquet):
        [(_, *pair)] = read(survey(shard, CLASSES)[0])
        assert tuple(pair) == GOOD


def test_an_empty_shard_holds_nothing(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([], pa.binary()), "target": pa.array([], pa.binary())})
    pq.write_table(table, tmp_path / "shard.parquet")
    for shard in (write_tar(tmp_path / "shard.tar", {}), str(tmp_path / "shard.parquet")):
        index, census = survey(shard, CLASSES)
        assert (index.num_rows, index.schema) == (0, INDEX)
        assert_equal(census, Census.zeros(4))


FAULTS: dict[str, tuple[bytes | None, bytes | None, str]] = {
    "no target": (GOOD_IMAGE, None, "is an image without target; a tar holds NAME.jpg with NAME.target.png"),
    "no image": (None, GOOD_TARGET, "is a target without image; a tar holds NAME.jpg with NAME.target.png"),
    "unknown ids": (
        GOOD_IMAGE,
        png(np.array([[0, 4], [9, 255]], np.uint8).repeat(12, 0).repeat(16, 1)),
        ": the target holds the ids [4, 9], which are neither one of the 4 classes nor ignore_index 255",
    ),
    "another size": (
        GOOD_IMAGE,
        encode_png(np.zeros((32, 24), np.uint8), CLASSES.palette),
        ": the target has 32×24 pixels (height×width), the image 24×32",
    ),
    "words as image": (b"these are words", GOOD_TARGET, ": the image cannot be decoded: not an image"),
    "empty image": (b"", GOOD_TARGET, ": the image cannot be decoded: empty"),
    "cut image": (GOOD_IMAGE[: len(GOOD_IMAGE) // 2], GOOD_TARGET, ": the image cannot be decoded: "),
    "words as target": (GOOD_IMAGE, b"these are words", ": the target cannot be decoded: "),
    "empty target": (GOOD_IMAGE, b"", ": the target cannot be decoded: "),
    "cut target": (GOOD_IMAGE, GOOD_TARGET[: len(GOOD_TARGET) // 2], ": the target cannot be decoded: "),
    "target in colours": (GOOD_IMAGE, GOOD_IMAGE, ": the target cannot be decoded: a label map is a grey or palette"),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_the_pair_that_has_it(fault: str, form: str, tmp_path: Path) -> None:
    image, target, message = FAULTS[fault]
    if form == "tar":
        bad = {"bad.jpg": image, "bad.target.png": target}
        members = {"good.jpg": GOOD_IMAGE, "good.target.png": GOOD_TARGET, **bad}
        shard = write_tar(tmp_path / "shard.tar", {name: data for name, data in members.items() if data is not None})
        name = "bad"
    else:
        shard, name = write_parquet(tmp_path / "shard.parquet", [GOOD, (image, target)]), "1"  # type: ignore[list-item]
    with pytest.raises(SourceError) as caught:
        survey(shard, CLASSES)
    assert f"{shard}#{name}{'' if message.startswith(':') else ' '}{message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_members_apart_are_no_pair(tmp_path: Path) -> None:
    members = {"a.jpg": GOOD_IMAGE, "b.jpg": GOOD_IMAGE, "a.target.png": GOOD_TARGET, "b.target.png": GOOD_TARGET}
    with pytest.raises(SourceError, match=r"shard\.tar#a is an image without target"):
        survey(write_tar(tmp_path / "shard.tar", members), CLASSES)


@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=200)
def test_a_damaged_target_raises_nothing_but_its_name(flips: list[tuple[float, int]]) -> None:
    data = bytearray(GOOD_TARGET)
    for where, value in flips:
        data[int(where * len(data))] = value
    try:
        decode_pair("shard.tar#a", GOOD_IMAGE, bytes(data), CLASSES)
    except SourceError as error:
        assert str(error).startswith("shard.tar#a: the target ")


def test_a_png_with_a_damaged_chunk_is_named() -> None:
    data = GOOD_TARGET.replace(b"IDAT", b"\x05\x13\x9a\x98")  # of which Pillow makes a SyntaxError
    with pytest.raises(SourceError, match=r"shard\.tar#a: the target cannot be decoded"):
        decode_pair("shard.tar#a", GOOD_IMAGE, data, CLASSES)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("form", FORMATS)
def test_a_truncated_shard_is_named(form: str, share: float, tmp_path: Path, scenes: dict[str, Pair]) -> None:
    path = tmp_path / f"shard.{form}"
    if form == "tar":
        members = {
            f"{name}.{end}": data
            for name, p in scenes.items()
            for end, data in zip(("jpg", "target.png"), p, strict=True)
        }
        write_tar(path, members)
    else:
        write_parquet(path, list(scenes.values()))
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(SourceError) as caught:
        survey(str(path), CLASSES)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["shard.tar.gz", "shard.tgz", "shard.tar"])
@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
def test_a_compressed_tar_is_named_whatever_it_is_called(
    name: str, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    plain = Path(write_tar(tmp_path / "plain", {"a.jpg": GOOD_IMAGE, "a.target.png": GOOD_TARGET})).read_bytes()
    (tmp_path / name).write_bytes(compress(plain))
    with pytest.raises(SourceError, match=rf"{name} is compressed, .* give it as plain \.tar"):
        survey(str(tmp_path / name), CLASSES)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [b"x"], "height": [1]}, r"no column target of bytes among image \(binary\), height \(int64\)"),
        ({"target": [b"x"]}, "no column image of bytes"),
        ({"bytes": [b"x"]}, "no column image and no target of bytes"),
        ({"image": ["a.jpg"], "target": ["a.png"]}, r"no column image and no target of bytes among image \(string\)"),
        ({"image": [{"bytes": b"x"}], "target": [b"x"]}, r"no column image of bytes among image \(struct"),
    ],
)
def test_a_parquet_shard_without_its_columns_is_named(
    columns: dict[str, list[object]], message: str, tmp_path: Path
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "shard.parquet")
    with pytest.raises(SourceError, match=rf"shard\.parquet: there is {message}"):
        survey(str(tmp_path / "shard.parquet"), CLASSES)


@pytest.mark.parametrize("shard", ["/nosuch/shard.tar", "/nosuch/shard.parquet", "nosuch://bucket/shard.tar"])
def test_a_shard_that_cannot_be_had_is_named(shard: str) -> None:
    with pytest.raises(SourceError, match=f"{shard} cannot be read: [A-Z]"):
        survey(shard, CLASSES)


def test_a_tar_that_became_shorter_since_is_no_pair_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PAUSES_SECONDS", (0.01,))
    shard = write_tar(tmp_path / "shard.tar", {"a.jpg": GOOD_IMAGE, "a.target.png": GOOD_TARGET})
    index, _ = survey(shard, CLASSES)
    Path(shard).write_bytes(Path(shard).read_bytes()[:600])
    with pytest.raises(ShortRead, match=r"bytes came"):
        read(index)


@pytest.mark.parametrize(
    ("ignore_index", "dtype"), [(255, np.uint8), (11, np.uint8), (65535, np.uint16), (1000, np.uint16)]
)
@pytest.mark.parametrize("form", FORMATS)
def test_void_counts_as_no_class(ignore_index: int, dtype: type[np.generic], form: str, tmp_path: Path) -> None:
    classes = Classes(CLASSES.names, ignore_index=ignore_index)
    target = np.zeros((24, 32), dtype)
    target[:2], target[2:5] = ignore_index, 3
    pair = GOOD_IMAGE, png(target)
    if form == "tar":
        shard = write_tar(tmp_path / "shard.tar", {"a.jpg": pair[0], "a.target.png": pair[1]})
    else:
        shard = write_parquet(tmp_path / "shard.parquet", [pair])
    index, census = survey(shard, classes)
    assert census.num_pixels.tolist() == [19 * 32, 0, 0, 3 * 32]
    assert census.num_void == 2 * 32
    [(uri, image_data, target_data)] = read(index)
    _, decoded = decode_pair(uri, image_data, target_data, classes)
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, target)
    with pytest.raises(SourceError, match=rf"the ids \[{ignore_index}\].* nor ignore_index 77"):
        survey(shard, Classes(CLASSES.names, ignore_index=77))


def test_hundreds_of_classes_are_counted() -> None:
    classes = Classes(tuple(map(str, range(300))), ignore_index=65535)
    target = np.arange(600, dtype=np.uint16).reshape(20, 30) % 300
    target[0, 0] = 65535
    image = np.zeros((20, 30, 3), np.uint8)
    census = Census.of(*decode_pair("a", png(image), png(target), classes), classes)
    assert census.num_pixels.tolist() == [1, *[2] * 299]
    assert census.num_void == 1


@st.composite
def pairs_and_a_cut(draw: st.DrawFn) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    number = draw(st.integers(1, 8))
    return [random_pair(rng, CLASSES) for _ in range(number)], draw(st.integers(0, number))


@given(pairs_and_a_cut())
@settings(deadline=None, max_examples=50)
def test_a_census_is_the_sum_of_its_parts_however_they_are_cut(
    found: tuple[list[tuple[np.ndarray, np.ndarray]], int],
) -> None:
    some, cut = found

    def census(of: list[tuple[np.ndarray, np.ndarray]]) -> Census:
        return sum((Census.of(image, target, CLASSES) for image, target in of), Census.zeros(4))

    assert_equal(census(some[:cut]) + census(some[cut:]), census(some))
    assert_equal(census(some[::-1]), census(some))
    assert_equal(Census.from_dict(census(some).to_dict()), census(some))

    pixels = np.concatenate([image.reshape(-1, 3) for image, _ in some]) / 255
    ids = np.concatenate([target.ravel() for _, target in some])
    whole = census(some)
    np.testing.assert_array_equal(whole.num_pixels, [(ids == class_id).sum() for class_id in range(4)])
    assert whole.num_void == (ids == 255).sum()
    np.testing.assert_allclose(whole.mean_and_std()[0], pixels.mean(0), rtol=0, atol=1e-9)
    if len(pixels) > 1:  # of one pixel it is 0, but for the square root of what floats round
        np.testing.assert_allclose(whole.mean_and_std()[1], pixels.std(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shade", [0, 1, 77, 255])
def test_images_of_one_shade_deviate_by_nothing(shade: int) -> None:
    image, target = np.full((50, 70, 3), shade, np.uint8), np.zeros((50, 70), np.uint8)
    mean, std = Census.of(image, target, CLASSES).mean_and_std()
    assert mean == pytest.approx((shade / 255,) * 3, abs=1e-9)
    assert std == pytest.approx((0, 0, 0), abs=1e-6)


@pytest.fixture
def indexed(tmp_path: Path) -> Iterator[tuple[str, dict[str, int], pa.Table, Census]]:
    """A folder of two shards with their index: its URI, the shards' sizes, and what is in them."""
    tar = write_tar(tmp_path / "shard-000000.tar", {"a.jpg": GOOD_IMAGE, "a.target.png": GOOD_TARGET})
    parquet = write_parquet(tmp_path / "shard-000001.parquet", [GOOD, GOOD])
    (first, of_first), (second, of_second) = survey(tar, CLASSES), survey(parquet, CLASSES)
    index, census = in_all([first, second]), of_first + of_second
    (tmp_path / INDEX_NAME).write_bytes(write_index(index, census))
    yield str(tmp_path), {shard: Path(shard).stat().st_size for shard in (tar, parquet)}, index, census


Indexed = tuple[str, dict[str, int], pa.Table, Census]


def test_an_index_comes_back_with_the_shards_full_names(indexed: Indexed) -> None:
    folder, sizes, index, census = indexed
    found = read_index(folder, sizes)
    assert found is not None
    assert found[0].equals(index)
    assert found[0].schema == INDEX
    assert found[1].to_dict() == census.to_dict()
    assert [pair[1:] for pair in read(found[0])] == [GOOD] * 3


def test_an_index_goes_with_its_folder(indexed: Indexed, tmp_path: Path, s3: object) -> None:
    folder, sizes, index, _ = indexed
    names = {shard.rpartition("/")[2]: size for shard, size in sizes.items()}
    assert folder.encode() not in (Path(folder) / INDEX_NAME).read_bytes()
    for other in (f"file://{tmp_path}/moved", "s3://segray/pairs-test/moved"):
        fs, path = filesystem(other)
        fs.put(f"{folder}/", f"{path}/", recursive=True)
        found = read_index(other, {f"{other}/{name}": size for name, size in names.items()})
        assert found is not None
        assert found[0]["shard"].to_pylist() == [f"{other}/{name}" for name in (*names, "shard-000001.parquet")]
        assert [(uri.rpartition("#")[2], *pair) for uri, *pair in read(found[0])] == [
            (name, *GOOD) for name in index["name"].to_pylist()
        ]


def test_an_index_of_other_shards_is_none(indexed: Indexed) -> None:
    folder, sizes, _, _ = indexed
    tar, parquet = sizes
    assert read_index(folder, sizes) is not None
    assert read_index(folder, {**sizes, tar: sizes[tar] + 1}) is None
    assert read_index(folder, {tar: sizes[tar]}) is None
    assert read_index(folder, {**sizes, f"{folder}/shard-000002.tar": 10}) is None
    assert read_index(folder, {tar: sizes[tar], f"{folder}/shard-000002.parquet": sizes[parquet]}) is None
    assert read_index(folder, {}) is None


@pytest.mark.parametrize("folder", ["/nosuch", "s3://segray/pairs-test/nothing"])
def test_where_there_is_no_index_there_is_none(folder: str, s3: object) -> None:
    assert read_index(folder, {f"{folder}/shard.tar": 1}) is None


def test_a_damaged_index_is_none_or_as_it_was(indexed: Indexed) -> None:
    folder, sizes, index, _ = indexed
    path = Path(folder) / INDEX_NAME
    whole = path.read_bytes()
    others: list[bytes] = [b"", b"words", b"PAR1PAR1", *(whole[: int(part * len(whole))] for part in (0.1, 0.5, 0.99))]
    for census_text in (None, "no JSON", "[]", "{}", '{"census": 3}', '{"census": {"num_images": 3}}'):
        metadata = {} if census_text is None else {"segray": census_text}
        buffer = io.BytesIO()
        pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), buffer)
        others.append(buffer.getvalue())
    for content in others:
        path.write_bytes(content)
        assert read_index(folder, sizes) is None, content[:40]

    rng = np.random.default_rng(0)
    pages = len(whole) - int.from_bytes(whole[-8:-4], "little") - 8
    for _ in range(250):
        damaged = bytearray(whole)
        damaged[rng.integers(pages)] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        found = read_index(folder, sizes)
        assert found is None or found[0].equals(index)
    for _ in range(250):
        damaged = bytearray(whole)
        damaged[rng.integers(pages, len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        read_index(folder, sizes)  # raises nothing


def test_an_index_of_other_columns_is_none(indexed: Indexed) -> None:
    folder, sizes, index, census = indexed
    path = Path(folder) / INDEX_NAME
    table = pq.read_table(io.BytesIO(write_index(index, census)))
    for other in (table.drop(["target_offset"]), table.append_column("more", pa.array([1, 2, 3]))):
        pq.write_table(other, path)
        assert read_index(folder, sizes) is None


def test_a_census_of_bands_is_of_pixels_that_have_data(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(300, 5, (2, 9, 7, 3)).astype(np.float32)
    values[0, :4] = np.nan
    target = encode_png(np.where(np.isnan(values[0, :, :, 0]), 255, 1).astype(np.uint8), CLASSES.palette)
    names = ("red", "nir", "swir")
    members: dict[str, bytes] = {}
    for number, window in enumerate(values):
        members |= {f"{number}.npz": bandfile.encode_values(window, names), f"{number}.target.png": target}
    shard = str(write_tar(tmp_path / "shard.tar", members))
    index, census = survey(shard, CLASSES)
    assert (index.num_rows, census.num_images, census.num_void) == (2, 2, 56)
    assert (census.bands, census.num_valid) == (names, 63 + 35)
    mean, std = census.mean_and_std()
    pixels = values[np.isfinite(values).all(3)].astype(np.float64)
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-9)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-6)
    again = Census.from_dict(json.loads(json.dumps(census.to_dict())))
    assert again.to_dict() == census.to_dict()
    for (uri, image, of_image), window in zip(read(index), values, strict=True):
        np.testing.assert_array_equal(decode_pair(uri, image, of_image, CLASSES)[0], window)


def test_shards_of_several_kinds_of_bands_are_refused(tmp_path: Path) -> None:
    window, target = np.ones((4, 4, 2), np.float32), encode_png(np.zeros((4, 4), np.uint8), CLASSES.palette)
    members: dict[str, bytes] = {}
    for name, names in (("a", ("red", "nir")), ("b", ("nir", "red"))):
        members |= {f"{name}.npz": bandfile.encode_values(window, names), f"{name}.target.png": target}
    with pytest.raises(SourceError, match="the bands red, nir and of the bands nir, red lie in the same shards"):
        survey(str(write_tar(tmp_path / "shard.tar", members)), CLASSES)
