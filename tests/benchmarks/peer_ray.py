"""The recipe of Ray's documentation: read_images → map_batches(actor) → write_parquet."""

import logging
import time

import numpy as np
import pyarrow.dataset as ds
import ray
import tyro

from tests.benchmarks import eager


class Segment:
    def __init__(self, way: eager.Way) -> None:
        self.model = eager.build(way)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        label_maps = eager.label_images(self.model, list(batch["image"]))
        return {"path": batch["path"], "label_map": label_maps, "at": np.full(len(label_maps), time.time())}


def main() -> None:
    way = tyro.cli(eager.Way)
    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    (
        ray.data.read_images(str(way.frames), mode="RGB", include_paths=True)
        .map_batches(
            Segment,
            fn_constructor_args=[way],
            batch_size=eager.BATCH_SIZE,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=max(1, way.threads - 1),  # one is left to read and to write, or nothing would go on
        )
        .write_parquet(str(way.sink))
    )
    ray.shutdown()
    eager.tell(ds.dataset(way.sink).to_table(columns=["at"])["at"].to_pylist())


if __name__ == "__main__":
    main()
