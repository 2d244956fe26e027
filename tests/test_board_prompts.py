"""Page *One query* of `lever board` shows prompts as an endpoint received them, to the letter."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from lever_board.board import Board
from lever_board.server import application
from lever_data.store.store import Run, Store
from lever_train.rollout.generate import generate
from tests.cases import long
from tests.commands import lever
from tests.endpoint import Endpoint, Fault, Handler, serving
from tests.rollouts import World, add_images, make_world
from tests.stores import candidate, commit, commit_examples, new_store

QUERIES = 2
Said = tuple[tuple[str, str], ...]  # (role, words) of every turn; no role where it is one text


def _shown(store: Store, query: int) -> list[tuple[str, Said, str]]:
    """Title, turns and text of the note of every candidate's prompt, as the page has them."""
    board = Board(store)
    client = TestClient(application(board, "t", 8000), base_url="http://127.0.0.1:8000/t/")
    text = client.get(f"query?dataset=d&split=train&id={query}").text
    board.close()
    found = []
    for title, inside in re.findall(
        r"<details><summary>(.*?)</summary>(.*?)</details>", text, re.S
    ):
        turns = re.findall(
            r'(?:<p class="role">(.*?)</p>)?<pre tabindex="0"><code>(.*?)</code></pre>',
            inside,
            re.S,
        )
        said = tuple((role, html.unescape(words)) for role, words in turns)
        note = html.unescape(re.sub("<.*?>", "", inside))
        found.append((html.unescape(title), said, note))
    return found


def _sent(body: dict[str, Any]) -> Said:
    """What a request says, pictures as `<>`."""
    if "prompt" in body:
        return (("", body["prompt"]),)
    found = []
    for turn in body["messages"]:
        content = turn["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        found.append((turn["role"], "".join(part.get("text", "<>") for part in parts)))
    return tuple(found)


def _world(folder: Path) -> World:
    """A world whose items are in its store."""
    world = make_world(folder, 16)
    files = world.questions, world.annotations
    lever("ingest", *files, "--store", world.store, "--dataset", "d", "--split", "train")
    return world


def _forget(file: Path) -> Fault:
    """The file is gone once the endpoint was asked: what was sent is what counts."""

    def fault(handler: Handler, question: str, attempt: int) -> bool:
        file.unlink(missing_ok=True)
        return False

    return fault


def _asked(world: World, endpoint: Endpoint, **changes: Any) -> Run:
    request = world.request(
        spec=f"openai:{endpoint.url}", model="m", limit=QUERIES, num_beams=2, **changes
    )
    run = generate(request).run
    assert run is not None
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        long({"images": False}),
        long({"images": False, "prompt_form": "turns"}),
        {"images": True, "system_prompt": "system.txt"},
        long({"images": False, "api": "completions"}),
        long({"images": False, "prompt_form": "lines", "system_prompt": "empty.txt"}),
    ],
)
def test_the_page_has_the_words_that_were_sent(tmp_path: Path, how: dict[str, Any]) -> None:
    world = _world(tmp_path)
    (tmp_path / "system.txt").write_text('Say <b>"one"</b> word.\n\n  No more.')
    (tmp_path / "empty.txt").write_text("")
    if how["images"]:
        add_images(world)
        how = {**how, "image_root": world.images}
    if "system_prompt" in how:
        how = {**how, "system_prompt": tmp_path / how["system_prompt"]}
    with serving() as endpoint:
        endpoint.fault = _forget(tmp_path / "system.txt")
        _asked(world, endpoint, **how)
    sent = {_sent(body) for body in endpoint.seen}
    shown = set()
    for query in range(QUERIES):
        for title, turns, _ in _shown(Store.open(world.store), query):
            assert title == "The prompt, as it was sent"
            shown.add(tuple((role, re.sub(r"<\S*?COCO\S+>", "<>", said)) for role, said in turns))
    assert shown == sent


@pytest.mark.long
def test_a_rescored_run_shows_what_its_parent_asked(tmp_path: Path) -> None:
    from lever_data.report.options import RescoreRequest
    from lever_data.report.rescore import rescore

    world = _world(tmp_path)
    with serving() as endpoint:
        run = _asked(world, endpoint, images=False)
    store = Store.open(world.store)
    files = {"questions": world.questions, "annotations": world.annotations}
    rescore(store, RescoreRequest(run=run.run, **files))
    both = _shown(store, 0)
    assert len(both) % 2 == 0 and {title for title, _, _ in both} == {"The prompt, as it was sent"}


@pytest.mark.long
def test_nearest_reads_no_prompt(tmp_path: Path) -> None:
    world = _world(tmp_path)
    generate(world.request(limit=1, num_beams=2))
    for title, turns, note in _shown(Store.open(world.store), 0):
        assert title == "No prompt" and turns == () and "reads no words" in note


@pytest.mark.slow
def test_a_run_without_a_record_says_so(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    commit(store, [candidate(0, 0, [1]), candidate(0, 1, [9])])
    row = {"dataset": "d", "split": "train", "answers": ["a"], "answer": "a"}
    asked = [row | {"example_id": n, "question_id": n, "question": f"what {n}?"} for n in range(2)]
    commit_examples(store, asked)
    known, unknown = _shown(store, 0)
    assert known[0] == "The prompt in lever's default words"
    assert "need not be those that were sent" in known[2]
    assert known[1][-1] == (
        "user", "Question:what 1? Short answer:aQuestion:what 0? Short answer:"
    )  # fmt: skip
    assert unknown[0] == "The prompt is not known" and unknown[1] == ()


@pytest.mark.long
def test_items_that_were_ingested_again_are_called_out(tmp_path: Path) -> None:
    world = _world(tmp_path)
    with serving() as endpoint:
        _asked(world, endpoint, images=False)
    store = Store.open(world.store)
    asked = {"dataset": "d", "split": "train", "answers": ["a"], "answer": "a"}
    rows = [
        asked | {"example_id": n, "question_id": 1000 + n, "question": "new"} for n in range(16)
    ]
    commit_examples(store, rows)
    for _, turns, note in _shown(store, 0):
        assert "Question:new" in turns[-1][1] and "ingested again" in note
