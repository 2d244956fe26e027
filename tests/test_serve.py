"""`lever serve`: picks over HTTP, and a 4xx in one sentence for what cannot be answered."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from starlette.testclient import TestClient

from lever_data.errors import UsageError
from lever_train.options.pack import ServeRequest
from lever_train.options.train import ModelConfig
from lever_train.pack.packed import PackedSelector
from lever_train.pack.serve import application, description, serve
from lever_train.rollout.policy import SelectorPolicy
from lever_train.selector.kinds import make_selector


@pytest.fixture(scope="module")
def selector() -> PackedSelector:
    torch.manual_seed(0)
    model = make_selector(8, ModelConfig(hidden=8)).eval().double()
    examples = pa.table({"example_id": np.arange(20), "question": [f"<{i}>" for i in range(20)]})
    return PackedSelector(SelectorPolicy("s", model), examples, torch.randn(20, 8), pool_size=6)


@pytest.fixture(scope="module")
def client(selector: PackedSelector) -> TestClient:
    request = ServeRequest(folder=Path("unused"), max_bytes=20_000, max_questions=9)
    return TestClient(application(selector, request))


def test_the_picks_are_the_selector_s(selector: PackedSelector, client: TestClient) -> None:
    vectors = torch.randn(5, 8).tolist()
    answer = client.post("/select", json={"vectors": vectors, "k": 3})
    assert answer.status_code == 200
    expected = selector.select(vectors, 3)
    assert [[p["id"] for p in row] for row in answer.json()["picks"]] == [
        [p.id for p in row] for row in expected
    ]
    assert answer.json()["picks"][0][0]["example"] == expected[0][0].example
    assert client.post(
        "/select",
        content=json.dumps({"vectors": vectors, "k": 3, "spaces": {"unread": vectors}}),
        headers={"content-type": "Application/JSON ; charset=utf-8"},
    ).is_success
    given = client.post("/select", json={"vectors": vectors[:1], "k": 1, "pools": [[4, 5, -1]]})
    assert given.json()["picks"][0][0]["id"] in (4, 5)


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        ({}, 422, "either questions or vectors"),
        ({"vectors": [[0.0] * 8], "questions": ["?"]}, 422, "either questions or vectors"),
        ({"vectors": [[0.0] * 8]}, 422, "does not stop by itself"),
        ({"vectors": [[0.0] * 7], "k": 1}, 422, "width 8"),
        ({"vectors": [[0.0] * 8, [0.0]], "k": 1}, 422, "equally many in each"),
        ({"vectors": [[0.0] * 8], "k": 0}, 422, "k: "),
        ({"vectors": [["a"] * 8], "k": 1}, 422, "vectors.0.0"),
        ({"vectors": [[0.0] * 8], "k": 1, "colour": 3}, 422, "colour"),
        ({"questions": ["?"], "k": 1}, 422, "names no encoder"),
        ({"vectors": [], "k": 1}, 422, "from 1 to 9"),
        ({"vectors": [[0.0] * 8] * 10, "k": 1}, 422, "from 1 to 9"),
        ({"vectors": [[0.0] * 8], "k": 1, "pools": [[77]]}, 422, "does not hold"),
        ({"vectors": [[0.1] * 10_000], "k": 1}, 413, "larger than 20,000 bytes"),
    ],
)
def test_a_request_that_cannot_be_answered(
    client: TestClient, body: dict[str, Any], status: int, why: str
) -> None:
    answer = client.post("/select", json=body)
    assert answer.status_code == status
    assert why in answer.json()["error"]


def test_only_json_is_read(client: TestClient) -> None:
    """What a form of a foreign page can send is not JSON."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {"content-type": kind}
        assert client.post("/select", content="{}", headers=headers).status_code == 415
    broken = {"content-type": "application/json"}
    assert client.post("/select", content="{", headers=broken).status_code == 422
    nan = '{"vectors": [[NaN, 0, 0, 0, 0, 0, 0, 0]], "k": 1}'
    assert client.post("/select", content=nan, headers=broken).status_code == 422
    assert client.get("/select").status_code == 405


def test_it_describes_itself(client: TestClient) -> None:
    found = client.get("/openapi.json").json()
    assert found == description()
    assert found["paths"]["/select"]["post"]["responses"].keys() == {"200", "413", "415", "422"}
    named = set(found["components"]["schemas"])
    text = json.dumps(found)
    assert {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]} <= named
    page = client.get("/")
    assert "POST /select" in page.text
    assert "http" not in page.text.replace("content-security", "")  # nothing from elsewhere
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_a_port_that_is_taken_is_said(selector: PackedSelector, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        request = ServeRequest(folder=tmp_path, port=taken.getsockname()[1])
        with (
            mock.patch("lever_train.pack.serve.load", return_value=selector),
            pytest.raises(UsageError, match="cannot listen at this address"),
        ):
            serve(request, lambda _: pytest.fail("it is not ready"))
