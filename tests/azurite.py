"""A real server of Azure's protocol on loopback: Microsoft's own emulator, from npm."""

from __future__ import annotations

import hashlib
import hmac
import shutil
import socket
import subprocess
import time
import uuid
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from urllib.request import Request, urlopen

ACCOUNT = "devstoreaccount1"  # the emulator's own, as its documentation gives them
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
PROGRAM = shutil.which("azurite-blob")


@contextmanager
def azurite() -> Iterator[dict[str, str]]:
    """The server, and what a command needs to reach it."""
    assert PROGRAM is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [PROGRAM, "--silent", "--inMemoryPersistence", "--blobPort", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with socket.socket() as caller:
                if caller.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{port}/{ACCOUNT}",
        }
    finally:
        process.kill()
        process.wait()


def new_container(environment: dict[str, str]) -> str:
    """A container that is there and empty; the address of a store in it."""
    name, date, version = f"c-{uuid.uuid4().hex[:12]}", formatdate(usegmt=True), "2021-08-06"
    signed = "\n".join(
        (
            f"PUT{11 * chr(10)}",
            f"x-ms-date:{date}",
            f"x-ms-version:{version}",
            f"/{ACCOUNT}/{ACCOUNT}/{name}",
            "restype:container",
        )
    )
    mac = hmac.new(b64decode(KEY), signed.encode(), hashlib.sha256).digest()
    heads = {
        "x-ms-date": date,
        "x-ms-version": version,
        "Authorization": f"SharedKey {ACCOUNT}:{b64encode(mac).decode()}",
        "Content-Length": "0",
    }
    url = f"{environment['AZURE_STORAGE_ENDPOINT']}/{name}?restype=container"
    urlopen(Request(url, method="PUT", headers=heads)).close()
    return f"az://{name}/a/store"
