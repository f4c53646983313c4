"""A script with torch's DataLoader: JPEG files to label maps as PNG files."""

import time
from pathlib import Path

import tyro
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

from tests.benchmarks import eager


class Frames(Dataset[tuple[Tensor, str]]):
    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        image = Image.open(self.paths[index]).convert("RGB")
        return eager.prepare(pil_to_tensor(image)), self.paths[index].stem


def main() -> None:
    way = tyro.cli(eager.Way)
    model = eager.build(way)
    at = []
    for values, names in DataLoader(Frames(way.frames), batch_size=eager.BATCH_SIZE, num_workers=way.threads):
        label_maps = eager.label(model, values)
        at += [time.time()] * len(names)
        for name, label_map in zip(names, label_maps, strict=True):
            Image.fromarray(label_map).save(way.sink / f"{name}.png")
    eager.tell(at)


if __name__ == "__main__":
    main()
