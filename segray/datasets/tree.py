"""A data set's folder, wherever it lies, and the pairs that two folders of files make."""

import hashlib
import re
from collections.abc import Callable, Container, Mapping, Sequence
from typing import TypeVar

from segray.datasets.dataset import Pair
from segray.errors import SourceError
from segray.retry import retrying
from segray.source import filesystem

__all__ = ["IMAGE_SUFFIXES", "Tree", "match", "safe_name"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif")
"""What images end in, in lower case."""

_UNSAFE = re.compile(r"[^A-Za-z0-9_/-]")

T = TypeVar("T")


class Tree:
    """A folder or prefix; paths in it are relative, with `/` between their parts.

    Each method but `uri` asks the store, and raises a SourceError where that does not answer.

    Attributes:
        source: as it was given.
    """

    def __init__(self, source: str) -> None:
        """Looks at nothing yet.

        Raises:
            SourceError: fsspec knows no such protocol, or its package is not installed.
        """
        self.source = source
        self._fs, root = self._ask(lambda: filesystem(source))
        self._root = root.rstrip("/")

    def uri(self, path: str) -> str:
        """The URI of what has this path, whether it is there or not."""
        return str(self._fs.unstrip_protocol(f"{self._root}/{path}"))

    def has(self, path: str) -> bool:
        """Whether there is such a file or folder."""
        return self._ask(lambda: bool(self._fs.exists(f"{self._root}/{path}")))

    def first(self, *paths: str) -> str | None:
        """The first of the paths that is there."""
        return next((path for path in paths if self.has(path)), None)

    def below(self, folder: str) -> "Tree":
        """A folder of it, as a tree."""
        return Tree(f"{self.source.rstrip('/')}/{folder}")

    def entries(self) -> list[str]:
        """Names of the files and folders in its root; none if there is no such folder."""
        return sorted(path.rstrip("/").rpartition("/")[2] for path in self._listing(self._fs.ls, self._root))

    def files(self, folder: str) -> list[str]:
        """Paths of the files in a folder and its subfolders, from that folder on; none if there is no such folder.

        What begins with a dot is left out: systems, archives and notebooks leave such behind. The folder itself may be
        a symbolic link; links to further folders in it are not followed.
        """
        root = f"{self._root}/{folder}".rstrip("/")

        def walk(root: str, detail: bool) -> list[str]:
            walked = self._fs.walk(root, detail=detail, on_error="raise")
            return [f"{path}/{name}"[len(root) + 1 :] for path, _, names in walked for name in names if name]

        files = self._listing(walk, root)
        return sorted(file for file in files if not any(part.startswith(".") for part in file.split("/")))

    def read(self, path: str) -> bytes | None:
        """The bytes of a file; None if there is no such file."""
        try:
            return self._ask(lambda: bytes(self._fs.cat_file(f"{self._root}/{path}")))
        except FileNotFoundError:
            return None

    def absent(self, what: str, layout: str) -> SourceError:
        """The error for what was looked for in vain, with the layout that would be right."""
        return SourceError(f"{self.source}: there is no {what}; {layout}")

    def _listing(self, call: Callable[..., list[str]], path: str) -> list[str]:
        try:
            return self._ask(lambda: call(path, detail=False))
        except FileNotFoundError:
            return []

    def _ask(self, call: Callable[[], T]) -> T:
        try:
            return retrying(call)
        except FileNotFoundError:
            raise
        except Exception as error:  # whatever the store's client raises: credentials, endpoint, DNS, …
            raise SourceError(f"{self.source} cannot be read: {error or type(error).__name__}") from error


def match(
    tree: Tree,
    folders: Mapping[str, tuple[str, str]],
    layout: str,
    image_suffixes: Sequence[str] = IMAGE_SUFFIXES,
    target_suffixes: Sequence[str] = (".png",),
    left_out: Container[str] = (),
) -> list[Pair]:
    """Pairs the files of folders of images and folders of targets whose paths are the same up to their suffixes.

    An image without a target, or a target without an image, makes a pair too: `read` says of it what is missing.

    Args:
        tree: where the folders lie.
        folders: those of the images and of the targets for each split. A split whose two folders are not both there
            was not downloaded, and is left out.
        layout: what there should be, for the error.
        image_suffixes: what an image may end in; upper and lower case are the same here.
        target_suffixes: what a target may end in.
        left_out: the URIs of files that are no images of their own.

    Raises:
        SourceError: there are no pairs, two files differ in their suffixes alone, or the store does not answer.
    """
    image_suffix = image_suffixes[0] if len(image_suffixes) == 1 else ".*"
    pairs: list[Pair] = []
    for split, (images, targets) in folders.items():
        if not (tree.has(images) and tree.has(targets)):
            continue
        image_of = _by_key(tree, images, image_suffixes, left_out)
        target_of = _by_key(tree, targets, target_suffixes)
        pairs += [
            Pair(
                name=safe_name(key),
                split=split,
                image=tree.uri(image_of.get(key, f"{images}/{key}{image_suffix}")),
                target=tree.uri(target_of.get(key, f"{targets}/{key}{target_suffixes[0]}")),
            )
            for key in image_of.keys() | target_of.keys()
        ]
    if not pairs:
        wanted = " and no ".join(f"{images} with {targets}" for images, targets in folders.values())
        raise tree.absent(f"{wanted} that hold files", layout)
    return pairs


def _by_key(tree: Tree, folder: str, suffixes: Sequence[str], left_out: Container[str] = ()) -> dict[str, str]:
    """The path of each file that ends in one of the suffixes, by its path in the folder without that."""
    found: dict[str, str] = {}
    for file in tree.files(folder):
        suffix = next((suffix for suffix in suffixes if file.lower().endswith(suffix.lower())), None)
        if suffix is None or tree.uri(f"{folder}/{file}") in left_out:
            continue
        path, key = f"{folder}/{file}", file[: -len(suffix)]
        if other := found.get(key):
            raise SourceError(f"{tree.uri(other)} and {tree.uri(path)} have the same name; keep one of them")
        found[key] = path
    return found


def safe_name(name: str) -> str:
    """A pair's name that is the same for the same file and is no other file's.

    Other characters than letters, digits, `_`, `-` and `/` become `_`, and a digest of the name as it was is added.
    Dots too: the key of a sample in a tar ends at the first (WebDataset).
    """
    safe = _UNSAFE.sub("_", name)
    if safe == name:
        return name
    return f"{safe}-{hashlib.blake2b(name.encode(errors='surrogateescape'), digest_size=4).hexdigest()}"
