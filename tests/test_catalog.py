import json
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import fsspec
import numpy as np
import pytest

from segray.catalog import SceneSource, described
from segray.errors import Reject, SettingsError, SourceError
from segray.preprocessing import Preprocessing, match_bands
from segray.scene import read
from segray.source import Source
from segray.tile import Scenes, Window
from tests.s3 import BUCKET, Server
from tests.stac import NUM_FOUND, Api, item, items, serving
from tests.test_scene import asset, draw, item_of, numbers

FIELD = {"type": "Polygon", "coordinates": [[[-87.5, 30.5], [-87.4, 30.5], [-87.4, 30.6], [-87.5, 30.5]]]}
BANDS = {"red": "B4", "nir": "B5"}


def listed(source: SceneSource) -> list[dict[str, Any]]:
    return [row for table in source.entries() for row in table.to_pylist()]


def uris(uri: str, **how: Any) -> list[str]:
    return [row["uri"] for row in listed(SceneSource(uri, **how))]


def versions(uri: str, **how: Any) -> list[str]:
    return [row["version"] for row in listed(SceneSource(uri, **how))]


def write(path: Path, fields: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields))
    return str(path)


# Folders


def test_a_folder_holds_rasters_items_and_results_and_other_json_is_counted(tmp_path: Path) -> None:
    raster = draw(tmp_path / "a.tif", numbers(20, 30))
    one = write(tmp_path / "one.json", item("one", href="elsewhere.tif"))
    results = write(tmp_path / "found" / "results.json", items(item("x"), item("y", self_link="https://api/y")))
    write(tmp_path / "classes.json", {"names": ["soil", "crop"]})
    write(tmp_path / "a.tif.aux.json", {"histogram": []})
    write(tmp_path / "fields.geojson", items({"type": "Feature", "properties": {}, "geometry": FIELD}))
    write(tmp_path / "list.json", ["stac_version"])
    write(tmp_path / "catalog.json", {"type": "Catalog", "stac_version": "1.0.0", "id": "c", "links": []})
    (tmp_path / "notes.md").write_text("notes")
    source = SceneSource(str(tmp_path))
    rows = listed(source)
    assert [row["uri"] for row in rows] == [
        f"file://{one}",
        f"file://{results}#x",
        "https://api/y",
        f"file://{raster}",
    ]
    assert source.num_other == 6
    assert rows[0]["version"] == versions(one)[0]
    assert rows[3]["version"] == versions(raster)[0]


def test_rasters_of_items_are_no_scenes_of_their_own(tmp_path: Path) -> None:
    one = write(tmp_path / "items" / "one.json", item("one", href="../tiles/a.tif"))
    for name in ("a", "b"):
        (tmp_path / "tiles").mkdir(exist_ok=True)
        draw(tmp_path / "tiles" / f"{name}.tif", numbers(20, 30))
    assert uris(str(tmp_path)) == [f"file://{one}", f"file://{tmp_path}/tiles/b.tif"]


def test_an_item_cut_short_is_a_scene_that_says_why(tmp_path: Path) -> None:
    text = json.dumps(item("one"))
    (tmp_path / "one.json").write_text(text[: len(text) // 2])
    [row] = listed(SceneSource(str(tmp_path)))
    with pytest.raises(Reject, match="not a STAC item"):
        described(row["uri"], row["version"], None, Scenes(size=32), lambda names: names)


def test_a_manifest_means_what_it_says(tmp_path: Path) -> None:
    draw(tmp_path / "a.tif", numbers(20, 30))
    draw(tmp_path / "L_B4.tif", numbers(20, 30))
    draw(tmp_path / "L_B5.tif", numbers(20, 30))
    write(tmp_path / "classes.json", {"names": ["soil"]})
    (tmp_path / "list.txt").write_text("a.tif\nL_{band}.tif\nclasses.json\ngone.tif\n")
    rows = listed(SceneSource(str(tmp_path / "list.txt"), bands=BANDS))
    assert [row["uri"].rpartition("/")[2] for row in rows] == ["a.tif", "L_{band}.tif", "classes.json", "gone.tif"]
    assert [row["version"] is None for row in rows] == [False, False, False, True]


def test_a_glob_takes_what_it_says(tmp_path: Path) -> None:
    for name in ("a.tif", "b.jp2.txt", "c.tif"):
        draw(tmp_path / name, numbers(20, 30))
    assert uris(f"{tmp_path}/*.tif") == [f"file://{tmp_path}/{name}.tif" for name in "ac"]


def test_nothing_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"gone\.json cannot be read: .*missing"):
        SceneSource(str(tmp_path / "gone.json"))
    with pytest.raises(SourceError, match="no such file"):
        SceneSource(str(tmp_path / "gone"))
    with pytest.raises(SourceError, match=r"classes\.json is no STAC item"):
        SceneSource(write(tmp_path / "classes.json", {"names": ["soil"]}))


# Items


def test_items_of_a_file_are_scenes_by_their_own_links_or_their_ids(tmp_path: Path) -> None:
    (tmp_path / "tiles").mkdir()
    draw(tmp_path / "tiles" / "a.tif", numbers(20, 30))
    here = item("S2/x y", href="./tiles/a.tif")
    path = write(
        tmp_path / "results.json",
        items(here, here, item("y", self_link="https://api/y"), item("z", self_link=f"{tmp_path}/z.json")),
    )
    rows = listed(SceneSource(path))
    uri = f"file://{path}#S2%2Fx%20y"
    assert [row["uri"] for row in rows] == [uri, "https://api/y", f"file://{tmp_path}/z.json"]
    scene = described(uri, "1", json.loads(rows[0]["item"]), Scenes(size=32), lambda names: names)
    np.testing.assert_array_equal(read(scene, Window(0, 0, 30, 20))[0][0], numbers(20, 30))


def test_an_item_is_as_old_as_it_says_or_as_what_it_holds(tmp_path: Path) -> None:
    def version(**what: Any) -> str:
        return versions(write(tmp_path / "results.json", items(item("x", **what))))[0]

    assert version(updated="2026-11-22T01:02:03Z") == "2026-11-22T01:02:03Z"
    assert version() == version() != version(href="b.tif")
    assert version(href="https://a/b.tif?sig=1") == version(href="https://a/b.tif?sig=2")


def test_of_an_item_only_files_that_the_model_is_fed_are_looked_at(tmp_path: Path) -> None:
    draw(tmp_path / "red.tif", numbers(20, 30))
    draw(tmp_path / "nir.tif", numbers(20, 30, seed=1))
    fields = item_of(
        {
            "nir": asset("nir.tif", "B5=nir"),
            "green": asset("gone.tif", "B3=green"),
            "red": asset("red.tif", "B4=red"),
        }
    )
    path = write(tmp_path / "one.json", fields)
    preprocessing = Preprocessing(channels=("RED", "nir"), mean=(0, 0), std=(1, 1))

    def match(names: Any) -> tuple[str, ...]:
        return match_bands(preprocessing, names)

    for given in (fields, None):
        scene = described(path, "1", given, Scenes(size=32), match)
        assert [band.name for band in scene.bands] == ["red", "nir"]
    renamed = Scenes(size=32, bands=("nir=B4", "red=nir"))
    scene = described(path, "1", fields, renamed, match)
    assert [band.path for band in scene.bands] == [str(tmp_path / "nir.tif"), str(tmp_path / "red.tif")]
    with pytest.raises(Reject, match="the model sees the bands blue"):
        blue = Preprocessing(channels=("blue",), mean=(0,), std=(1,))
        described(path, "1", fields, Scenes(size=32), lambda names: match_bands(blue, names))


def test_bands_of_a_raster_are_renamed_and_samples_mean_what_the_settings_say(tmp_path: Path) -> None:
    samples = numbers(3, 20, 30)
    path = draw(tmp_path / "a.tif", samples)
    told = Scenes(size=32, bands=("nir=3", "red=1"), scale=0.5, offset=-1.0, nodata=7.0)
    scene = described(path, "1", None, told, lambda names: ("red", "nir"))
    values, valid = read(scene, Window(0, 0, 30, 20))
    np.testing.assert_array_equal(valid, (samples[[0, 2]] != 7).all(0))
    np.testing.assert_array_equal(values, np.where(valid, samples[[0, 2]] * 0.5 - 1, 0))


# Templates


def draw_bands(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate(names):
        draw(folder / name, numbers(20, 30, seed=seed))


def test_a_template_is_a_scene_for_each_way_to_fill_it_in(tmp_path: Path) -> None:
    names = [f"LC08_{day}_{band}.TIF" for day in ("0804", "0820") for band in ("B4", "B5", "B11", "QA")]
    draw_bands(tmp_path, *names, "other_B4.TIF", "LC08_0905_QA.TIF")
    rows = listed(SceneSource(f"{tmp_path}/LC08_*_{{band}}.TIF", bands=BANDS))
    expected = [f"file://{tmp_path}/LC08_{day}_{{band}}.TIF" for day in ("0804", "0820")]
    assert [row["uri"] for row in rows] == expected
    for row in rows:
        [alone] = listed(SceneSource(row["uri"], bands=BANDS))
        assert alone == row
        scene = described(row["uri"], row["version"], None, Scenes(size=32, bands=("red=B4", "nir=B5")), lambda n: n)
        assert [Path(band.path).name[-7:-4].strip("_") for band in scene.bands] == ["B4", "B5"]


def test_the_version_of_a_template_is_that_of_its_bands(tmp_path: Path) -> None:
    template = f"{tmp_path}/*_{{band}}.tif"
    draw_bands(tmp_path, "x_B4.tif", "x_B5.tif", "x_B6.tif")
    [before] = versions(template, bands=BANDS)
    draw(tmp_path / "x_B6.tif", numbers(40, 30))
    assert versions(template, bands=BANDS) == [before]
    draw(tmp_path / "x_B5.tif", numbers(40, 30))
    assert versions(template, bands=BANDS) != [before]


def test_a_template_may_name_a_band_twice_and_reach_into_folders(tmp_path: Path) -> None:
    for scene in ("x", "y"):
        (tmp_path / scene).mkdir()
        draw_bands(tmp_path / scene / "B4", "x_B4.tif", "x_B5.tif")
        draw_bands(tmp_path / scene / "B5", "x_B5.tif")
    found = uris(f"{tmp_path}/**/{{band}}/*_{{band}}.tif", bands=BANDS)
    assert found == [f"file://{tmp_path}/{scene}/{{band}}/x_{{band}}.tif" for scene in ("x", "y")]


def test_a_scene_that_lacks_a_band_is_found_and_rejected(tmp_path: Path) -> None:
    draw_bands(tmp_path, "x_B4.tif")
    [row] = listed(SceneSource(f"{tmp_path}/*_{{band}}.tif", bands=BANDS))
    with pytest.raises(Reject, match="missing"):
        described(
            row["uri"], row["version"], None, Scenes(size=32, bands=("red=B4", "nir=B5")), lambda names: ("red", "nir")
        )


def test_a_template_wants_to_know_its_bands(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--scenes\.bands red=B4"):
        SceneSource(f"{tmp_path}/{{band}}.tif")


def test_a_template_is_found_on_s3(s3: Server, tmp_path: Path) -> None:
    fs, root = fsspec.core.url_to_fs(f"s3://{BUCKET}/templates", use_listings_cache=False)
    draw(tmp_path / "a.tif", numbers(20, 30))
    for name in ("x_B4.tif", "x_B5.tif", "y_B4.tif", "x_B6.tif"):
        fs.put(str(tmp_path / "a.tif"), f"{root}/{name}")
    rows = listed(SceneSource(f"s3://{root}/*_{{band}}.tif", bands=BANDS))
    assert [row["uri"] for row in rows] == [f"s3://{root}/{name}_{{band}}.tif" for name in "xy"]
    assert versions(rows[0]["uri"], bands=BANDS) == [rows[0]["version"]]


# Catalogs


def catalog_on(folder: Path) -> str:
    """Two collections in a catalog, three items, one of which is a file that is gone."""
    head = {"stac_version": "1.0.0", "description": "d"}
    extent = {"spatial": {"bbox": [[-180, -90, 180, 90]]}, "temporal": {"interval": [[None, None]]}}
    for name, of_it in (("s2", ["a", "b"]), ("l8", ["gone"])):
        links = [{"rel": "item", "href": f"./{one}/{one}.json"} for one in of_it]
        fields = {"type": "Collection", "id": name, "license": "x", "extent": extent, "links": links, **head}
        write(folder / name / "collection.json", fields)
    for one in ("a", "b"):
        write(folder / "s2" / one / f"{one}.json", item(one, href="./a.tif"))
        draw(folder / "s2" / one / "a.tif", numbers(20, 30))
    links = [{"rel": "child", "href": f"./{name}/collection.json"} for name in ("s2", "l8")]
    return write(folder / "catalog.json", {"type": "Catalog", "id": "c", "links": links, **head})


def test_a_catalog_is_walked_on_disk(tmp_path: Path) -> None:
    rows = listed(SceneSource(catalog_on(tmp_path)))
    assert [row["uri"] for row in rows] == [
        f"file://{tmp_path}/{name}.json" for name in ("s2/a/a", "s2/b/b", "l8/gone/gone")
    ]
    in_folder = {row["uri"]: row["version"] for row in listed(SceneSource(str(tmp_path / "s2")))}
    assert {row["uri"]: row["version"] for row in rows} == in_folder | {rows[2]["uri"]: None}
    assert uris(str(tmp_path / "s2" / "collection.json")) == [row["uri"] for row in rows[:2]]


def test_a_catalog_is_walked_on_s3(s3: Server, tmp_path: Path) -> None:
    catalog_on(tmp_path)
    fs, root = fsspec.core.url_to_fs(f"s3://{BUCKET}/catalog", use_listings_cache=False)
    for path in tmp_path.rglob("*.json"):
        fs.put(str(path), f"{root}/{path.relative_to(tmp_path)}")
    rows = listed(SceneSource(f"s3://{root}/s2/collection.json"))
    assert [row["uri"] for row in rows] == [f"s3://{root}/s2/{one}/{one}.json" for one in "ab"]
    assert all(row["version"] for row in rows)


def test_a_catalog_is_walked_over_http(tmp_path: Path) -> None:
    catalog_on(tmp_path)

    class Files(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args: Any) -> None:
            pass

    with serving(Files) as root:
        rows = listed(SceneSource(f"{root}/catalog.json"))
        assert [row["uri"] for row in rows] == [f"{root}/{name}.json" for name in ("s2/a/a", "s2/b/b", "l8/gone/gone")]
        assert [bool(row["version"]) for row in rows] == [True, True, False]


# APIs


@pytest.fixture
def api() -> Iterator[str]:
    Api.asked.clear()
    with serving(Api) as root:
        yield root


def test_a_search_gives_every_item_of_every_page(api: str) -> None:
    rows = listed(SceneSource(f"{api}/search?collections=s2,l8&datetime=2026-11-22/..&bbox=-88,30,-87,31&limit=2"))
    assert [row["uri"] for row in rows] == [f"{api}/collections/s2/items/{index}" for index in range(NUM_FOUND)]
    assert {row["version"] for row in rows} == {"2026-11-22T00:00:00Z"}
    assert all(json.loads(row["item"])["assets"] for row in rows)
    method, path, wanted = Api.asked[0]
    assert (method, path, wanted["collections"], wanted["limit"]) == ("GET", "/search", "s2,l8", "2")
    assert wanted["datetime"] == "2026-11-22T00:00:00Z/.."
    assert [float(text) for text in wanted["bbox"].split(",")] == [-88, 30, -87, 31]


def test_a_search_asks_for_the_area_unless_it_names_one(api: str) -> None:
    assert len(uris(f"{api}/search?collections=s2", area=FIELD)) == NUM_FOUND
    assert Api.asked[0] == ("POST", "/search", {"collections": ["s2"], "intersects": FIELD})
    Api.asked.clear()
    uris(f"{api}/search?collections=s2&bbox=0,0,1,1", area=FIELD)
    assert "intersects" not in Api.asked[0][2]


def test_a_search_may_filter_with_an_area_and_without(api: str) -> None:
    text = "eo:cloud_cover < 10"
    query = urlencode({"collections": "s2", "filter": text})
    assert len(uris(f"{api}/search?{query}")) == NUM_FOUND
    assert Api.asked[0][2] == {"collections": "s2", "filter": text, "filter-lang": "cql2-text"}
    Api.asked.clear()
    assert len(uris(f"{api}/search?{query}", area=FIELD)) == NUM_FOUND
    method, _, wanted = Api.asked[0]
    assert (method, wanted["bbox"]) == ("GET", "-87.5,30.5,-87.4,30.6"), "as a POST takes no text for a filter"
    assert (wanted["filter"], wanted["filter-lang"]) == (text, "cql2-text")
    as_json = {"op": "<", "args": [{"property": "eo:cloud_cover"}, 10]}
    query = urlencode({"collections": "s2", "filter": json.dumps(as_json), "filter-lang": "cql2-json"})
    Api.asked.clear()
    assert len(uris(f"{api}/search?{query}", area=FIELD)) == NUM_FOUND
    method, _, wanted = Api.asked[0]
    assert (method, wanted["intersects"]) == ("POST", FIELD)
    assert (wanted["filter"], wanted["filter-lang"]) == (as_json, "cql2-json")


def test_a_collection_of_an_api_is_all_of_its_items_or_those_near_the_area(api: str) -> None:
    for url in (f"{api}/collections/s2", f"{api}/collections/s2/items"):
        Api.asked.clear()
        assert len(uris(url, area=FIELD)) == NUM_FOUND
        *_, (_, path, wanted) = [asked for asked in Api.asked if "bbox" in asked[2]]
        assert (path, wanted["bbox"]) == ("/collections/s2/items", "-87.5,30.5,-87.4,30.6")


def test_a_search_may_find_nothing_and_says_that_it_is_one(api: str) -> None:
    source = SceneSource(f"{api}/search?collections=empty")
    assert source.is_search
    assert listed(source) == []


def test_an_item_that_a_service_updates_is_new_though_as_long_as_before(
    api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert versions(f"{api}/items/of-today") == ["2026-11-22T00:00:00Z"]
    monkeypatch.setattr(Api, "updated", "2026-11-23T00:00:00Z")
    assert versions(f"{api}/items/of-today") == ["2026-11-23T00:00:00Z"]


def test_what_an_api_is_not_asked_is_refused(api: str) -> None:
    with pytest.raises(SourceError, match="cloud is not of a search"):
        listed(SceneSource(f"{api}/search?cloud=10"))
    with pytest.raises(SourceError, match="is all of an API; name a collection of it, or a search: "):
        SceneSource(f"{api}/")
    with pytest.raises(SourceError, match="cannot be listed"):
        listed(SceneSource(f"{api}/none/search"))


def test_images_are_listed_as_they_were(tmp_path: Path) -> None:
    draw(tmp_path / "a.tif", numbers(20, 30))
    write(tmp_path / "a.json", item("a"))
    [table] = Source(str(tmp_path)).entries()
    assert table["uri"].to_pylist() == [f"file://{tmp_path}/a.tif"]
