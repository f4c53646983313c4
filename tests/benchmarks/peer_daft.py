"""A query of Daft: from_glob_path → download → decode → UDF → write_parquet."""

import time

import daft
import numpy as np
import pyarrow.dataset as ds
import tyro
from daft import DataType, Series, col

from tests.benchmarks import eager


@daft.udf(
    return_dtype=DataType.struct({"label_map": DataType.tensor(DataType.uint8()), "at": DataType.float64()}),
    batch_size=eager.BATCH_SIZE,
    concurrency=1,
)
class Segment:
    def __init__(self, way: eager.Way) -> None:
        self.model = eager.build(way)

    def __call__(self, images: Series) -> list[dict[str, object]]:
        label_maps = eager.label_images(self.model, [np.asarray(image) for image in images.to_pylist()])
        at = time.time()
        return [{"label_map": label_map, "at": at} for label_map in label_maps]


def main() -> None:
    way = tyro.cli(eager.Way)
    segment = Segment.with_init_args(way)  # type: ignore[attr-defined]
    (
        daft.from_glob_path(f"{way.frames}/*.jpg")
        .with_column("image", col("path").url.download().image.decode(mode="RGB"))
        .with_column("labelled", segment(col("image")))
        .select("path", col("labelled").struct.get("label_map"), col("labelled").struct.get("at"))
        .write_parquet(str(way.sink))
    )
    eager.tell(ds.dataset(way.sink).to_table(columns=["at"])["at"].to_pylist())


if __name__ == "__main__":
    main()
