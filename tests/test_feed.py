import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segray import demo, feed
from segray.augment import Augmentation
from segray.demo import CLASSES, Draw
from segray.errors import SourceError
from segray.feed import Order
from segray.pairs import survey, write_index

NUM_SCENES = 12
TASKS = feed.Tasks(num_cpus=0.5, concurrency=2, store_bytes=2**28)
EXACT = Augmentation(crop=64, scale=(1.0, 1.0), rotation=0.0, colour=0.0, blur=0.0)


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes in three tar shards."""
    folder = tmp_path_factory.mktemp("fields")
    demo.draw(Draw(sink=str(folder), num_scenes=NUM_SCENES, first_seed=0, format="tar", shard_scenes=4))
    return folder


@given(
    num_images=st.integers(1, 60), batch_size=st.integers(1, 60), num_workers=st.integers(1, 9), seed=st.integers(0, 99)
)
@settings(deadline=None)
def test_workers_share_a_step_and_an_epoch_shows_no_image_twice(
    num_images: int, batch_size: int, num_workers: int, seed: int
) -> None:
    order = Order(num_images=num_images, batch_size=min(batch_size, num_images), seed=seed)
    seen: Counter[int] = Counter()
    for step in range(order.steps_per_epoch):
        shares = [order.share(step, rank, num_workers) for rank in range(num_workers)]
        assert np.concatenate(shares).tolist() == order.batch(step).tolist()
        assert len(order.batch(step)) == order.batch_size
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        seen.update(order.batch(step).tolist())
    assert set(seen.values()) <= {1}
    assert set(seen) <= set(range(num_images))


def test_each_epoch_has_an_order_of_its_own_that_the_seed_decides() -> None:
    orders = [Order(num_images=50, batch_size=50, seed=seed) for seed in (0, 0, 1)]
    first, second, other = (order.batch(0).tolist() for order in orders)
    assert first == second != other
    assert sorted(orders[0].batch(1).tolist()) == sorted(first)
    assert orders[0].batch(1).tolist() != first


def stream(split: feed.Split, steps: range, rank: int = 0, num_workers: int = 1) -> list[dict[str, np.ndarray]]:
    order = Order(num_images=split.index.num_rows, batch_size=5, seed=3)
    found = feed.batches(
        split,
        CLASSES,
        order,
        EXACT,
        resize=None,
        steps=steps,
        rank=rank,
        num_workers=num_workers,
        tasks=TASKS,
    )
    return [{name: tensor.numpy() for name, tensor in batch.items()} for batch in found]


def test_what_a_step_sees_does_not_depend_on_workers_or_on_where_it_began(fields: Path, ray_cluster: None) -> None:
    split = feed.surveyed(str(fields), feed.find(str(fields), str(fields))[0], CLASSES, is_packed=True)
    alone = stream(split, range(6))
    assert [len(batch["row"]) for batch in alone] == [5] * 6
    later = stream(split, range(4, 6))
    for batch, same in zip(alone[4:], later, strict=True):
        assert all((batch[name] == same[name]).all() for name in batch)
    shares = [stream(split, range(6), rank, 2) for rank in range(2)]
    for number, batch in enumerate(alone):
        for name, values in batch.items():
            assert (np.concatenate([share[number][name] for share in shares]) == values).all(), name
    assert alone[0]["image"].shape == (5, 64, 64, 3)
    assert alone[0]["target"].shape == (5, 64, 64)
    # Image 3 of one epoch and of another is cut differently.
    cuts = [batch["image"][place] for batch in alone for place in np.flatnonzero(batch["row"] == alone[0]["row"][0])]
    assert len(cuts) > 1
    assert (cuts[0] != cuts[1]).any()


def test_a_step_is_one_batch_however_large_it_is(
    fields: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.data

    monkeypatch.setattr(ray.data.DataContext.get_current(), "target_max_block_size", 1000)
    split = feed.surveyed(str(fields), feed.find(str(fields), str(fields))[0], CLASSES, is_packed=True)
    assert [len(batch["row"]) for batch in stream(split, range(2))] == [5, 5]


def test_whole_images_come_in_their_order(fields: Path, ray_cluster: None) -> None:
    split = feed.surveyed(str(fields), feed.find(str(fields), str(fields))[0], CLASSES, is_packed=True)
    found = list(feed.pairs(split, CLASSES, range(1, NUM_SCENES, 2), TASKS))
    assert [pair["uri"].rpartition("#")[2] for pair in found] == [f"scene-{n:07d}" for n in range(1, NUM_SCENES, 2)]
    for seed, pair in zip(range(1, NUM_SCENES, 2), found, strict=True):
        np.testing.assert_array_equal(pair["target"], demo.scene(seed)[1])
        assert pair["image"].shape == (*pair["target"].shape, 3)


def test_folders_named_train_and_val_are_what_they_say(fields: Path, tmp_path: Path) -> None:
    for folder, shards in (("train", (0, 1)), ("val", (2,))):
        (tmp_path / folder).mkdir()
        for shard in shards:
            (tmp_path / folder / f"shard-{shard}.tar").symlink_to(fields / f"shard-{shard:06d}.tar")
    to_train, to_validate = feed.find(str(tmp_path), None)
    assert [uri.rpartition("/")[2] for uri in to_train] == ["shard-0.tar", "shard-1.tar"]
    assert [uri.rpartition("/")[2] for uri in to_validate] == ["shard-2.tar"]
    (tmp_path / "train").rename(tmp_path / "more")
    to_train, to_validate = feed.find(str(tmp_path), None)
    assert [uri.rpartition("/")[2] for uri in to_train] == ["shard-0.tar", "shard-1.tar"]
    assert [uri.rpartition("/")[2] for uri in to_validate] == ["shard-2.tar"]
    to_train, to_validate = feed.find(str(tmp_path), str(fields))
    assert len(to_train) == 2, "what lies in SOURCE/val is not trained on either"
    assert len(to_validate) == 3
    assert all(size > 0 for size in to_train.values())


def test_otherwise_the_last_shard_is_to_validate_on(fields: Path) -> None:
    to_train, to_validate = feed.find(str(fields), None)
    assert [uri.rpartition("/")[2] for uri in to_validate] == ["shard-000002.tar"]
    assert not to_train.keys() & to_validate.keys()
    assert len(to_train) == 2


def test_shards_with_an_index_beside_them_are_not_read_again(
    fields: Path, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shard-000000.tar").write_bytes((fields / "shard-000000.tar").read_bytes())
    index, census = survey(f"file://{tmp_path}/shard-000000.tar", CLASSES)
    shards = feed.find(str(tmp_path), str(tmp_path))[0]
    read = feed.surveyed(str(tmp_path), shards, CLASSES, is_packed=True)
    (tmp_path / "_index.parquet").write_bytes(write_index(index, dataclasses.replace(census, num_void=7)))
    told = feed.surveyed(str(tmp_path), shards, CLASSES, is_packed=True)
    assert told.index.equals(read.index)
    assert (read.census.num_void, told.census.num_void) == (0, 7), "a number that only the index has"
    others = {uri: size + 1 for uri, size in shards.items()}
    assert feed.surveyed(str(tmp_path), others, CLASSES, is_packed=True).census.num_void == 0, "other shards"
    assert feed.surveyed(str(tmp_path), shards, CLASSES, is_packed=False).census.num_void == 0, "other classes"


def test_a_source_without_shards_or_with_one_says_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(SourceError, match="no shards"):
        feed.find(str(tmp_path), None)
    (tmp_path / "shard-000000.tar").write_bytes(b"")
    with pytest.raises(SourceError, match="give --val"):
        feed.find(str(tmp_path), None)
