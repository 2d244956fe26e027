"""A bucket: objects under one address, listed, read by range, put if absent, deleted.

In goes ``s3://bucket/prefix`` (or ``gs://``, ``az://``), out come objects by their keys below it.
Credentials come from the environment or the files of the cloud's own tools, and no error repeats
what a server answered beyond its status and code: S3 answers a bad signature with the key's name.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lever_data.errors import LeverError

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

Answer = TypeVar("Answer")
CHUNK = 8 << 20  # bytes read at a time: what one request may lose
_TIMEOUT = "120s"  # of one request: 8 MiB at 70 kB/s
_RETRIES = 6  # 0.1 s, 0.2 s, … 3.2 s apart
State = Mapping[str, str]  # by it a put is bound to the object it replaces
_DIGEST = "sha256"  # name of the metadata that says what was uploaded


@dataclass(frozen=True)
class Object:
    """An object as a listing shows it; ``modified`` is the time of the bucket's own clock."""

    key: str
    size: int
    etag: str | None
    modified: datetime
    version: str | None = None

    @property
    def state(self) -> State:
        """What tells it from what lies under its key before and after it."""
        return _state(self.etag, self.version)


class Bucket:
    """The objects below one address; many threads may use it at once."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._objects = _connect(uri, _environment())

    def require_writable(self) -> None:
        """Refuse a place that is only read; of a bucket its server says so."""

    def objects(self, folder: str) -> list[Object]:
        """Every object below a folder, by key."""
        import obstore

        found = self._ask(lambda: obstore.list(self._objects, folder).collect())
        return sorted(map(_object, found), key=lambda one: one.key)

    def folders(self) -> set[str]:
        """The names before the first slash."""
        import obstore

        found = self._ask(lambda: obstore.list_with_delimiter(self._objects))
        return set(found["common_prefixes"])

    def read(self, key: str) -> bytes | None:
        """The bytes of a small object; ``None`` where there is none."""
        return self._read(key)[0]

    def _read(self, key: str) -> tuple[bytes | None, State]:
        """The bytes of a small object with their state."""
        import obstore

        def whole() -> tuple[bytes, State]:
            found = obstore.get(self._objects, key)
            return bytes(found.bytes()), _object(found.meta).state

        try:
            return self._ask(whole)
        except FileNotFoundError:
            return None, {}

    def sha256(self, key: str) -> str | None:
        """What :meth:`upload` said the bytes are; ``None`` without an object, or of another's."""
        import obstore

        try:
            found = self._ask(lambda: obstore.get(self._objects, key, options={"head": True}))
        except FileNotFoundError:
            return None
        digest = found.attributes.get(_DIGEST)
        return digest if isinstance(digest, str) else None

    def size(self, key: str) -> int:
        """Bytes of an object.

        Raises:
            FileNotFoundError: there is none.
        """
        return self._head(key).size

    def look(self, key: str) -> Object | None:
        """An object as it is now; ``None`` where there is none."""
        try:
            return self._head(key)
        except FileNotFoundError:
            return None

    def chunks(self, key: str, size: int) -> Iterator[bytes]:
        """The bytes of an object in pieces.

        Raises:
            FileNotFoundError: there is none.
        """
        import obstore

        for start in range(0, size, CHUNK):
            length = min(CHUNK, size - start)
            piece = partial(obstore.get_range, self._objects, key, start=start, length=length)
            yield bytes(self._ask(piece))

    def digest(self, key: str) -> str:
        """Hex sha256 of the bytes that lie there now.

        Raises:
            FileNotFoundError: there is none.
        """
        digest = hashlib.sha256()
        for piece in self.chunks(key, self.size(key)):
            digest.update(piece)
        return digest.hexdigest()

    def create(self, key: str, data: bytes) -> bool:
        """Put an object where there is none; whether it is there with these bytes now."""
        return self.swap(key, data, None) is not None

    def swap(self, key: str, data: bytes, old: State | None) -> State | None:
        """Put an object in the place of one in this state, where ``None`` of nothing; its state,
        ``None`` where another lies there now.

        Where the reply is lost the object may have been stored: it is read again, and a second
        attempt of the library's that finds the first one's is no conflict either.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        mode: Any = "create" if old is None else dict(old)
        try:
            with self._readable_errors():
                put = obstore.put(self._objects, key, data, mode=mode, use_multipart=False)
            return _state(put["e_tag"], put["version"])
        except (AlreadyExistsError, PreconditionError, FileNotFoundError, LeverError) as error:
            found, state = self._read(key)
            if found == data:
                return state
            if isinstance(error, LeverError):
                raise
            return None

    def upload(self, key: str, path: Path, digest: str) -> None:
        """Put a file, whole or not at all; ``digest`` is the sha256 of its bytes."""
        import obstore

        self._ask(lambda: obstore.put(self._objects, key, path, attributes={_DIGEST: digest}))

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; those that are gone already do not matter."""
        import obstore

        if not keys:
            return
        try:
            self._ask(lambda: obstore.delete(self._objects, list(keys)))
        except FileNotFoundError:  # gs:// says so of the first that is gone, and others may be left
            for key in keys:
                with suppress(FileNotFoundError):
                    self._ask(partial(obstore.delete, self._objects, key))

    def now(self) -> datetime:
        """The time by the bucket's clock, which stamps what is put into it."""
        import obstore

        key = f"staging/{uuid.uuid4().hex}"
        self._ask(lambda: obstore.put(self._objects, key, b"what time is it?"))
        try:
            return self._head(key).modified
        finally:
            self.delete([key])

    def _head(self, key: str) -> Object:
        import obstore

        return _object(self._ask(lambda: obstore.head(self._objects, key)))

    def _ask(self, call: Callable[[], Answer]) -> Answer:
        """Do what may be done twice; a reply that is cut short is asked for again.

        The library does so itself after an error of the server or the connection, but not when a
        body ends early.
        """
        for _ in range(_RETRIES):
            try:
                with self._readable_errors():
                    return call()
            except LeverError as error:
                if "body error" not in error.what:
                    raise
        with self._readable_errors():
            return call()

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        """Make what the library says one line; an absent object stays a FileNotFoundError.

        Raises:
            LeverError: no bucket, no permission, no credentials, no connection, or a fault there.
        """
        from obstore.exceptions import (
            AlreadyExistsError,
            BaseError,
            InvalidPathError,
            PreconditionError,
        )

        try:
            yield
        except (AlreadyExistsError, PreconditionError):
            raise
        except InvalidPathError as error:
            named = re.search(r'Path "([^"]*)"', str(error))
            raise LeverError(
                "an object lies there whose name is no path, and no listing gets past it",
                where=self.uri,
                value=named and named[1],
                hint="it is not lever's: move it away with the cloud's own tool",
            ) from None
        except (FileNotFoundError, BaseError) as error:
            said = _said(error)
            if isinstance(error, FileNotFoundError) and not _names_no_bucket(said):
                raise FileNotFoundError(said) from None
            raise LeverError(
                f"the bucket cannot be used ({said})", where=self.uri, hint=_hint(said)
            ) from None


def _object(found: ObjectMeta) -> Object:
    size, modified = found["size"], found["last_modified"]
    return Object(found["path"], size, found["e_tag"], modified, found["version"])


def _state(etag: str | None, version: str | None) -> State:
    said = {"e_tag": etag, "version": version}
    return {name: value for name, value in said.items() if value is not None}


def _said(error: Exception) -> str:
    """The status and the code of an answer, which name no credentials; else what failed."""
    text = str(error).partition("Debug source")[0]
    status = re.search(r"status code: (\d+ [A-Za-z ]+)", text)
    code = re.search(r"<Code>(\w+)</Code>", text)
    words = [found[1].strip() for found in (status, code) if found]
    if not words and (found := re.search(r"HTTP error: ([^<|\n(]*)", text)):
        words = [found[1].strip()]
    return ", ".join(words) or type(error).__name__


def _names_no_bucket(said: str) -> bool:
    return "NoSuchBucket" in said or "ContainerNotFound" in said  # S3 and GCS; Azure


def _hint(said: str) -> str:
    if _names_no_bucket(said):
        return "make the bucket first, or mend its name"
    if "TimeTooSkewed" in said:
        return "the clock of this machine is wrong, and requests are signed with the time: set it"
    if "301" in said or "AuthorizationHeaderMalformed" in said:
        return "AWS_REGION names the region that the bucket lies in"
    if any(word in said for word in ("401", "403", "Token", "Unauthenticated", "Permission")):
        return (
            "may the credentials of the environment list, read, write and delete there? "
            "(AWS_PROFILE or AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_…)"
        )
    return "nothing is lost, and the same command goes on: is the address of the server right?"


def _environment() -> tuple[tuple[str, str], ...]:
    """What a connection depends on."""
    clouds = ("AWS_", "GOOGLE_", "AZURE_")
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith(clouds)))


@cache
def _connect(uri: str, environment: tuple[tuple[str, str], ...]) -> ObjectStore:
    """The library's own view of an address; one per process, so that connections are kept."""
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError:
        raise LeverError(
            "a store in a bucket needs a library that is not installed",
            where=uri,
            hint="pip install 'lever[remote]'",
        ) from None
    given = dict(environment)
    endpoints = [v for name, v in given.items() if "ENDPOINT" in name or name == "GOOGLE_BASE_URL"]
    more: dict[str, Any] = {}
    if uri.startswith("s3:") and not {"AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE"} & given.keys():
        more["credential_provider"] = _profile(uri)
    try:
        return from_url(
            uri,
            client_options={
                "timeout": _TIMEOUT,
                "allow_http": any(value.startswith("http://") for value in endpoints),
            },
            retry_config={"max_retries": _RETRIES},
            **more,
        )
    except (BaseError, ValueError) as error:
        said = str(error).partition("\n")[0]
        if any(value in said for value in given.values() if value):
            said = type(error).__name__  # it repeats a value, and that may be a secret
        raise LeverError(
            f"the environment does not say what this bucket needs ({said})",
            where=uri,
            hint="AWS_… of S3, GOOGLE_… of gs://, AZURE_STORAGE_ACCOUNT_NAME and …_KEY of az://",
        ) from None


def _profile(uri: str) -> Any:
    """Credentials as AWS's own tools find them: profiles, sign-on, the role of a machine.

    Raises:
        LeverError: there are none.
    """
    from boto3 import Session
    from obstore.auth.boto3 import Boto3CredentialProvider

    session = Session()
    if session.get_credentials() is None:
        raise LeverError(
            "there are no credentials for this bucket",
            where=uri,
            hint="`aws configure`, AWS_PROFILE or AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY; "
            "AWS_SKIP_SIGNATURE=true for a public one",
        )
    return Boto3CredentialProvider(session)
