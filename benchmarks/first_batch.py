"""From a store, in a folder or a bucket, to the first batch of a training.

    python -m benchmarks.first_batch STORE VECTORS.npy

``seconds`` runs from opening the store; imports are left out.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from lever_data.paths import store_path
from lever_train.learn.batch import Loader
from lever_train.learn.data import open_data
from lever_train.options.train import Source, TrainConfig


def main() -> None:
    place, vectors = sys.argv[1:]
    config = TrainConfig.model_validate(
        {"data": {"view": ["all_candidates"], "query_embeddings": vectors}}
    )
    started = time.perf_counter()
    data = open_data(Source(store=store_path(place)), config)
    batch = next(Loader(data, torch.device("cpu"), batch_size=128).batches(data.train))
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "candidates": int(batch.mask.sum())}))


if __name__ == "__main__":
    main()
