import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from segray.classes import Classes
from segray.errors import SettingsError


def test_the_palette_is_pascal_vocs_unless_given() -> None:
    palette = Classes(tuple(f"class {class_id}" for class_id in range(21))).palette
    # The first colours of Pascal VOC 2012, and its last (tv/monitor).
    assert palette[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert palette[15] == (192, 128, 128)
    assert palette[20] == (0, 64, 128)
    assert Classes(("a", "b"), ((1, 2, 3), (4, 5, 6))).palette == ((1, 2, 3), (4, 5, 6))


def test_colours_differ_for_256_classes() -> None:
    assert len(set(Classes(tuple(map(str, range(256))), ignore_index=999).palette)) == 256


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"names": ()}, "there are no names"),
        ({"names": ("sky", "road", "sky")}, "given twice: sky"),
        ({"names": ("sky", "road"), "palette": ((0, 0, 0),)}, "1 colours for 2 names"),
        ({"names": ("sky",), "palette": ((0, 0, 256),)}, r"\(0, 0, 256\) is not three integers from 0 to 255"),
        ({"names": ("sky",), "palette": ((0, -1, 0),)}, "three integers"),
        ({"names": ("sky",), "palette": ((0, 0),)}, "three integers"),
        ({"names": ("sky",), "palette": ((0, 0, 0.5),)}, "three integers"),
        ({"names": ("sky", "road"), "ignore_index": 1}, "ignore_index 1 is the id of the class 'road'"),
    ],
)
def test_classes_that_contradict_themselves_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Classes(**fields)


def test_a_dict_and_back() -> None:
    classes = Classes(("sky", "road"), ((1, 2, 3), (4, 5, 6)), ignore_index=11)
    assert Classes.from_dict(classes.to_dict()) == classes
    assert Classes.from_dict(json.loads(json.dumps(classes.to_dict()))) == classes
    assert len(classes) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"names": None},
        {"names": "sky"},
        {"names": [{"name": "sky"}]},
        {"names": ["sky"], "palette": [1]},
        {"names": ["sky"], "palette": [[1, 2]]},
        {"names": ["sky"], "palette": 3},
        {"names": ["sky"], "ignore_index": "void"},
        {"names": ["sky"], "ignore_index": None},
    ],
)
def test_a_dict_of_the_wrong_form_is_refused_with_the_right_one(fields: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r'expected \{"names": '):
        Classes.from_dict(fields)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    "text",
    ['{"names": ["sky", "grüne Wiese"]}', '\n ["sky", "grüne Wiese"]\n', "sky\n\n  grüne Wiese\r\n"],
)
def test_a_file_is_read_as_json_or_lines(tmp_path: Path, text: str, mark: str) -> None:
    path = tmp_path / "classes"
    path.write_bytes((mark + text).encode())
    assert Classes.read(str(path)) == Classes(("sky", "grüne Wiese"))


def test_a_file_keeps_palette_and_ignore_index() -> None:
    fields = {"names": ["sky", "road"], "palette": [[9, 8, 7], [6, 5, 4]], "ignore_index": 7}
    with fsspec.open("memory://classes/test.json", "wt") as file:
        json.dump(fields, file)
    classes = Classes.read("memory://classes/test.json")
    assert (classes.palette, classes.ignore_index) == (((9, 8, 7), (6, 5, 4)), 7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "classes.txt: the classes file cannot be read"),
        (b"", "there are no names"),
        (b'{"names": ["sky"', "classes.txt: not valid JSON"),
        (b"\xff\xfe\x00", "classes.txt: the classes file cannot be read"),
    ],
)
def test_a_file_that_holds_no_classes_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "classes.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        Classes.read(str(path))


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        Classes.read("nosuch://bucket/classes.json")


def test_palette_colours_are_of_use_to_numpy() -> None:
    assert np.asarray(Classes(("a", "b", "c")).palette, np.uint8).shape == (3, 3)
