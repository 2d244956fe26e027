"""A store in a data set of the Hugging Face hub, to be read: ``hf://datasets/ORG/NAME[/FOLDER]``.

The same small interface as a bucket's, by the hub's own HTTP calls: ``api/datasets/…/tree`` lists,
``datasets/…/resolve`` gives bytes. The token is that of the hub's own tools (HF_TOKEN, or the file
``hf auth login`` writes); HF_ENDPOINT names another hub. What is written goes there as a commit of
the whole folder, by ``hf upload`` after ``lever copy``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote

from lever_data.errors import LeverError
from lever_data.store.bucket import CHUNK, Bucket, Object

if TYPE_CHECKING:
    import httpx

_RETRIES = 4
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)  # the hub's listing tells no times, and nothing is swept


class Hub(Bucket):
    """The files of a data set below one folder; all that would change them is refused."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        _, org, name, *folder = uri.removeprefix("hf://").split("/")
        self._repository = f"{org}/{name}"
        self._folder = "".join(f"{word}/" for word in folder)

    def objects(self, folder: str) -> list[Object]:
        """Every file below a folder, by key."""
        listed = [entry for entry in self._tree(folder, "true") if entry["type"] == "file"]
        found = [Object(self._key(e), e["size"], e["oid"], _NEVER) for e in listed]
        return sorted(found, key=lambda one: one.key)

    def folders(self) -> set[str]:
        """The names before the first slash."""
        return {self._key(e) for e in self._tree("", "false") if e["type"] == "directory"}

    def _tree(self, folder: str, recursive: str) -> Iterator[dict[str, Any]]:
        place = quote(f"{self._folder}{folder}".strip("/"))
        url = f"/api/datasets/{self._repository}/tree/main/{place}".rstrip("/")
        while url:
            reply = self._get(url, params=None if "?" in url else {"recursive": recursive})
            if reply is None:
                return
            yield from reply.json()
            url = reply.links.get("next", {}).get("url", "")

    def _key(self, entry: dict[str, Any]) -> str:
        return str(entry["path"]).removeprefix(self._folder)

    def read(self, key: str) -> bytes | None:
        """The bytes of a small file; ``None`` where there is none."""
        reply = self._get(self._file(key))
        return None if reply is None else reply.content

    def size(self, key: str) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError: there is none.
        """
        reply = self._get(self._file(key), headers={"Range": "bytes=0-0"})
        if reply is None:
            raise FileNotFoundError(key)
        whole = reply.headers.get("Content-Range")  # without it the whole file came
        return int(whole.rpartition("/")[2]) if whole else len(reply.content)

    def chunks(self, key: str, size: int) -> Iterator[bytes]:
        """The bytes of a file in pieces.

        Raises:
            FileNotFoundError: there is none.
        """
        for start in range(0, size, CHUNK):
            end = min(start + CHUNK, size) - 1
            reply = self._get(self._file(key), headers={"Range": f"bytes={start}-{end}"})
            if reply is None:
                raise FileNotFoundError(key)
            yield reply.content if reply.status_code == 206 else reply.content[start : end + 1]

    def _file(self, key: str) -> str:
        return f"/datasets/{self._repository}/resolve/main/{quote(self._folder + key)}"

    @cached_property
    def _client(self) -> httpx.Client:
        import httpx
        from huggingface_hub import get_token

        token = get_token()
        return httpx.Client(
            base_url=os.environ.get("HF_ENDPOINT", "https://huggingface.co"),
            headers={"Authorization": f"Bearer {token}"} if token else {},
            follow_redirects=True,
            timeout=120,
        )

    def _get(self, url: str, **more: Any) -> httpx.Response | None:
        """A reply, ``None`` where the hub has no such file or folder in a data set it shows.

        Raises:
            LeverError: no such data set, no permission, no connection, or a fault there.
        """
        import httpx

        said = ""
        for attempt in range(_RETRIES):
            try:
                reply = self._client.get(url, **more)
            except httpx.HTTPError as error:
                said = type(error).__name__
            else:
                if reply.is_success:
                    return reply
                code = reply.headers.get("X-Error-Code", "")
                if code == "EntryNotFound":
                    return None
                said = f"{reply.status_code} {code}".strip()
                if reply.status_code < 500 and reply.status_code != 429:
                    break
            time.sleep(0.1 * 2**attempt)
        raise LeverError(
            f"the data set cannot be read ({said})",
            where=self.uri,
            hint="is the name right, and may your token read it? (HF_TOKEN, `hf auth login`)",
        )

    def require_writable(self) -> NoReturn:
        """Refuse.

        Raises:
            LeverError: always.
        """
        raise LeverError(
            "a store on the hub is only read",
            where=self.uri,
            hint="`lever copy` it into a folder, change it there, then `hf upload`",
        )

    def create(self, key: str, data: bytes) -> NoReturn:
        """Refuse."""
        self.require_writable()

    def upload(self, key: str, path: Path, digest: str) -> NoReturn:
        """Refuse."""
        self.require_writable()
