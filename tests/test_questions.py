"""Questions and annotations: every publisher's layout as it stands, ids, order, broken items."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lever_data.errors import LeverError, UsageError
from lever_data.items.items import Place, load_items, official_id
from lever_data.relations.db import open_session
from lever_data.sources.ingest import IngestOptions, ingest
from lever_data.store.store import Run, Store

TEN = [{"answer": a, "answer_id": i} for i, a in enumerate(["red"] * 6 + ["blue"] * 4)]


def put(folder: Path, *files: Any, **options: Any) -> tuple[Run, list[str]]:
    """Ingest files of this content as dataset ``d``; returns the run and what was said."""
    paths, said = [], list[str]()
    for number, content in enumerate(files):
        paths.append(folder / f"{number}.json")
        paths[-1].write_text(content if isinstance(content, str) else json.dumps(content))
    given = IngestOptions(**({"dataset": "d", "split": "val"} | options), notice=said.append)
    *_, last = ingest(paths, Store.create(folder / "s"), given)
    return last.run, said


def examples(folder: Path, *columns: str) -> list[tuple[Any, ...]]:
    con = open_session(folder / "s", only=["examples"]).con
    return con.execute(f"select {', '.join(columns)} from examples order by example_id").fetchall()


LAYOUTS = {
    "TextVQA": (
        {
            "dataset_type": "val",
            "data": [
                {
                    "question": "what brand?",
                    "image_id": "004420",
                    "image_classes": ["Camera"],
                    "question_id": 34602,
                    "answers": ["nous", "dakota", *["nous"] * 8],
                    "set_name": "val",
                }
            ],
        },
        ("34602", "004420", "004420.jpg", "what brand?", 10, "nous"),
    ),
    "VizWiz": (
        [
            {
                "image": "VizWiz_val_00000000.jpg",
                "question": "what is it?",
                "answers": [{"answer": "soup", "answer_confidence": "yes"}] * 10,
                "answer_type": "other",
                "answerable": 1,
            }
        ],
        (
            "VizWiz_val_00000000.jpg",
            None,
            "VizWiz_val_00000000.jpg",
            "what is it?",
            10,
            "soup",
        ),
    ),
    "VQA-X": (
        {
            "262284001": {
                "question": "is it hot?",
                "answers": TEN,
                "image_id": "262284",
                "image_name": "COCO_val2014_000000262284.jpg",
                "explanation": ["because"],
                "answer_type": "yes/no",
            }
        },
        (
            "262284001",
            "262284",
            "val2014/COCO_val2014_000000262284.jpg",
            "is it hot?",
            10,
            "red",
        ),
    ),
    "A-OKVQA": (
        [
            {
                "split": "val",
                "image_id": 461751,
                "question_id": "22jbM6gDxdaMaunuzgrsBB",
                "question": "what is done?",
                "choices": ["a", "b"],
                "correct_choice_idx": 0,
                "direct_answers": ["surf"] * 9 + ["swim"],
                "difficult_direct_answer": False,
            }
        ],
        (
            "22jbM6gDxdaMaunuzgrsBB",
            "461751",
            "val2017/000000461751.jpg",
            "what is done?",
            10,
            "surf",
        ),
    ),
    "GQA": (
        {
            "05451384": {
                "semantic": [{"operation": "select", "argument": "sky (2486325)"}],
                "question": "what is blue?",
                "imageId": "2382986",
                "isBalanced": True,
                "answer": "sky",
                "fullAnswer": "The sky is blue.",
            }
        },
        ("05451384", "2382986", "2382986.jpg", "what is blue?", 1, "sky"),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_official_layouts_are_ingested_as_they_stand(name: str, tmp_path: Path) -> None:
    content, expected = LAYOUTS[name]
    run, said = put(tmp_path, content)
    wanted = ("question_id", "image_id", "image_path", "question", "len(answers)", "answer")
    assert examples(tmp_path, *wanted) == [expected]
    assert run.kind == "examples"
    assert any("one to three annotators" in line for line in said) == (name == "GQA")


def test_items_find_their_images_and_keep_their_ids(tmp_path: Path) -> None:
    put(tmp_path, LAYOUTS["TextVQA"][0])
    con = open_session(tmp_path / "s", only=["examples", "queries"]).con
    root = tmp_path / "images"
    (item,) = load_items(con, Place("d", "val", root)).values()
    assert (item.question_id, item.image_id, item.image) == (34602, "004420", root / "004420.jpg")
    (item,) = load_items(con, Place("d", "val", root, "x_{image_id}.png")).values()
    assert item.image == root / "x_004420.png"
    with pytest.raises(UsageError, match="--image-name does not fit"):
        load_items(con, Place("d", "val", root, "{image}.png"))


def test_an_image_name_of_ones_own(tmp_path: Path) -> None:
    questions = {"questions": [{"question_id": "q-7", "image_id": 5, "question": "?"}]}
    put(tmp_path, questions, image_name="f/{image_id:03d}.png")
    assert examples(tmp_path, "question_id", "image_path") == [("q-7", "f/005.png")]


def test_one_id_in_two_spellings() -> None:
    ids: list[int | str] = ["305", 305, "004420", "x", "-1", "0", 0]
    assert [official_id(i) for i in ids] == [305, 305, "004420", "x", "-1", 0, 0]


def asked(*ids: Any) -> dict[str, Any]:
    return {"questions": [{"question_id": i, "question": f"q{i}"} for i in ids]}


def noted(*ids: Any, answers: int = 10) -> dict[str, Any]:
    said = [{"answer": "x"}] * answers
    return {"annotations": [{"question_id": i, "answers": said} for i in ids]}


def test_order_is_a_choice_that_is_said_stored_and_part_of_the_run(tmp_path: Path) -> None:
    by_file, said = put(tmp_path, asked(20, 3, 100), noted(3, 20, 100))
    assert any("--order question_id" in line for line in said)
    assert examples(tmp_path, "example_id", "question_id") == [(0, "20"), (1, "3"), (2, "100")]
    by_id, said = put(tmp_path, asked(20, 3, 100), noted(3, 20, 100), order="question_id")
    assert said == []
    assert examples(tmp_path, "example_id", "question_id") == [(0, "3"), (1, "20"), (2, "100")]
    assert (by_file.details["order"], by_id.details["order"]) == ("file", "question_id")
    assert by_file.run != by_id.run


def test_texts_come_behind_numbers(tmp_path: Path) -> None:
    put(tmp_path, asked("b", 20, "a", 3), order="question_id")
    assert [row[0] for row in examples(tmp_path, "question_id")] == ["3", "20", "a", "b"]


def test_one_broken_question_costs_that_question_and_keeps_its_place(tmp_path: Path) -> None:
    broken = {"questions": [*asked(9)["questions"], {"question_id": 4}, *asked(1)["questions"]]}
    with pytest.raises(LeverError, match="missing required field `question`"):
        put(tmp_path, broken, noted(1, 4, 9))
    _, said = put(tmp_path, broken, noted(1, 4, 9), salvage=True)
    assert any(line.startswith("left out: Object missing required field") for line in said)
    assert examples(tmp_path, "example_id", "question_id") == [(0, "9"), (2, "1")]
    put(tmp_path, broken, noted(1, 4, 9), salvage=True, order="question_id")
    assert examples(tmp_path, "example_id", "question_id") == [(0, "1"), (2, "9")]
    unreadable = {"questions": [{"question": 5}, *asked(1)["questions"]]}
    with pytest.raises(LeverError, match="has no id that can be read"):
        put(tmp_path, unreadable, salvage=True, order="question_id")


@pytest.mark.parametrize(("answers", "is_few"), [(0, False), (1, True), (3, True), (4, False)])
def test_few_annotators_are_said(tmp_path: Path, answers: int, is_few: bool) -> None:
    run, said = put(tmp_path, asked(1, 2), noted(1, 2, answers=answers))
    assert any("2 of 2 questions have one to three annotators" in s for s in said) == is_few
    assert run.details["few_annotators"] == (2 if is_few else 0)


def test_unanswered_questions_are_counted_by_themselves(tmp_path: Path) -> None:
    _, said = put(tmp_path, asked(1, 2, 3), noted(2))
    assert any("2 questions have no annotation" in line for line in said)
    with pytest.raises(LeverError, match="2 of 3 annotations belong to no question"):
        put(tmp_path, asked(1), noted(1, 2, 3))


def test_questions_alone_do_not_hide_answers_that_are_there(tmp_path: Path) -> None:
    run, _ = put(tmp_path, asked(1, 2), noted(1, 2))
    with pytest.raises(UsageError, match="would hide those of a run in the store") as error:
        put(tmp_path, asked(1, 2, 3))
    assert error.value.value == run.run and "name the annotations" in str(error.value.hint)
    put(tmp_path, asked(1, 2, 3), split="test")
    put(tmp_path, asked(1, 2, 3), noted(1))


def test_a_newer_file_of_a_split_counts_whole(tmp_path: Path) -> None:
    """Not its first rows with the rest of an older one."""
    put(tmp_path, asked(1, 2, 3))
    put(tmp_path, asked(8, 9))
    assert examples(tmp_path, "question_id") == [("8",), ("9",)]
