"""The pictures of a store: those that came inside data sets, each a file named by its content.

In go the bytes of pictures; out comes the folder that holds ``images/<sha256>``: the store's own,
or the mirror of its bucket, with every picture fetched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from lever_data.store.files import write_atomic
from lever_data.store.mirror import Mirror
from lever_data.store.mirror_room import IMAGES

_AT_ONCE = 64  # pictures in memory on their way to a bucket


def pictures_of(store: Path) -> Path | None:
    """The folder below which a store's pictures lie; ``None`` where it holds none.

    Raises:
        LeverError: they do not fit into the cache, or one is not what was put.
    """
    mirror = Mirror.of(store)
    holds = (store / IMAGES).is_dir() if mirror is None else mirror.fetch_pictures()
    return store if holds else None


def put_pictures(store: Path, pictures: Iterable[tuple[str, bytes]]) -> None:
    """Put pictures into a store, each under its name (``images/<sha256>``) where it is not there.

    Raises:
        LeverError: the bucket refuses it.
    """
    mirror = Mirror.of(store)
    if mirror is None:
        for name, data in pictures:
            if not (path := store / name).exists():
                path.parent.mkdir(exist_ok=True)
                write_atomic(path, data)
        return
    bucket = mirror.bucket
    with ThreadPoolExecutor(8) as pool:
        for batch in _batches(pictures):
            for _ in pool.map(lambda one: bucket.create(*one), batch):
                pass


def _batches(pictures: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    coming = iter(pictures)
    while batch := list(islice(coming, _AT_ONCE)):
        yield batch
