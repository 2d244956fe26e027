"""Every fault of an RL file: where it is, to the byte, and what salvage keeps beside it."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from lever_data.errors import LeverError
from lever_data.readers.json_object import VALUE_LIMIT
from lever_data.sources.ingest import ingest
from lever_data.sources.ingest_options import IngestOptions
from lever_data.store.store import Run, Store

GOOD = '"0": {"pointer_candidates": [{"pointer": [1, 2], "vqa_correct": 1}]}'
MORE = '"7": {"pointer_candidates": [{"pointer": [1, 2]}]}'
HEAD = '"1": {"pointer_candidates": [{"pointer": [3, 4]}, {'
WHERE = "query '1', field pointer_candidates[1]"


@dataclass(frozen=True)
class Fault:
    """A broken member, the bytes where its error must point, and parts of the message."""

    text: str
    at: str
    what: str
    where: str = ""


def candidate(text: str, at: str, what: str, field: str = "") -> Fault:
    return Fault(HEAD + text + "}]}", at, what, WHERE + field)


FAULTS = {
    "negative id": candidate('"pointer": [1, -2]', "-2", "Expected `int` >= 0", ".pointer[1]"),
    "float id": candidate('"pointer": [1, 2.5]', "2.5", "got `float`", ".pointer[1]"),
    "huge id": candidate('"pointer": [4294967296]', "4294967296", "<= 2147483647", ".pointer[0]"),
    "text pointer": candidate('"pointer": "12"', '"12"', "Expected `array`", ".pointer"),
    "id of text": candidate(
        '"pointer": ["q3"]', '"q3"', "named by its place in its split, not by its id", ".pointer[0]"
    ),
    "no pointer": candidate('"beam_rank": 1', '{"beam_rank', "missing required field `pointer`"),
    "repeated id": candidate('"pointer": [5, 6, 5]', "[5, 6, 5]", "repeats an id", ".pointer"),
    "positions": candidate(
        '"pointer": [5, 6], "pointer_pos": [1]', "[1]", "has 2 ids, pointer_pos 1", ".pointer_pos"
    ),
    "text score": candidate('"pointer": [9], "beam_score": "a"', '"a"', "`str`", ".beam_score"),
    "correct": candidate('"pointer": [9], "vqa_correct": 2', "2", "<= 1", ".vqa_correct"),
    "mode": candidate(
        '"pointer": [9], "vqa_eval_mode": "odd"', '"odd"', "enum value 'odd'", ".vqa_eval_mode"
    ),
    "accuracy": candidate('"pointer": [9], "vqa_acc_score": 7', "7", "<= 1", ".vqa_acc_score"),
    "negative accuracy": candidate(
        '"pointer": [9], "vqa_acc_score": -0.1', "-0.1", ">= 0", ".vqa_acc_score"
    ),
    "probability": candidate('"pointer": [9], "vqa_gt_prob": 1.5', "1.5", "<= 1", ".vqa_gt_prob"),
    "temperature": candidate('"pointer": [9], "temperature": -1', "-1", ">= 0", ".temperature"),
    "rank": candidate('"pointer": [9], "beam_rank": -1', "-1", ">= 0", ".beam_rank"),
    "log-probability": candidate(
        '"pointer": [9], "logprob_score": 0.5', "0.5", "<= 0.0001", ".logprob_score"
    ),
    "outside its pool": Fault(
        '"1": {"candidate_pool_indices": [3, 4], "pointer_candidates": [{"pointer": [3, 4]}, '
        '{"pointer": [4, 9]}]}',
        "[4, 9]",
        "example 9 is not in the query's pool of 2",
        WHERE + ".pointer",
    ),
    "not at its positions": Fault(
        '"1": {"candidate_pool_indices": [3, 4], "pointer_candidates": [{"pointer": [3, 4]}, '
        '{"pointer": [4, 3], "pointer_pos": [0, 1]}]}',
        "[0, 1]",
        "pointer_pos [0, 1] names [3, 4] in the pool, not the pointer",
        WHERE + ".pointer_pos",
    ),
    "pool": Fault(
        '"1": {"candidate_pool_indices": [3, 4, 3], "pointer_candidates": [{"pointer": [4]}]}',
        "[3, 4, 3]",
        "the query's pool repeats an id",
        "query '1', field candidate_pool_indices",
    ),
    "right without accuracy": candidate(
        '"pointer": [9], "vqa_eval_mode": "vqaEval", "vqa_correct": 1, "vqa_acc_score": 0.0',
        "1, ",
        "vqa_correct is 1 where the official accuracy is 0.0",
        ".vqa_correct",
    ),
    "wrong with accuracy": candidate(
        '"pointer": [9], "vqa_eval_mode": "file", "vqa_correct": 0, "vqa_acc_score": 0.3',
        "0, ",
        "vqa_correct is 0 where the official accuracy is 0.3",
        ".vqa_correct",
    ),
    "failed but right": candidate(
        '"pointer": [9], "vqa_eval_mode": "error", "vqa_correct": 1',
        "1}",
        "a failed evaluation that counts as right",
        ".vqa_correct",
    ),
    "position and id": candidate(
        '"pointer": [1], "pointer_global": [7], "candidate_pool_ids": [5, 6]',
        "[7]",
        "pointer_global is not what the positions [1] name in the pool: [6]",
        ".pointer_global",
    ),
    "position": candidate(
        '"pointer": [2], "candidate_pool_ids": [5, 6]', "[2]", "beyond the query's pool", ".pointer"
    ),
    "answer": Fault(
        '"1": {"query": {"gt_answers_raw": [{"text": 5}]}, "pointer_candidates": []}',
        '{"text',
        "an answer without a text",
        "field query.gt_answers_raw[0]",
    ),
    "key twice": candidate(
        '"pointer": [9], "beam_score": 8, "beam_score": 99', "99", "occurs twice", ".beam_score"
    ),
    "raw newline": Fault(HEAD + '"x": "a\nb"}]}', "\nb", "Invalid control character", "query '1'"),
    "surrogate": Fault(HEAD + '"x": "\\ud800"}]}', '"\\ud800', "half of a surrogate", "query '1'"),
    "surrogate in a top key": Fault('"_\\ud800": 1', '"_\\ud800', "half of a surrogate"),
    "depth": Fault(HEAD + f'"x": {"[" * 100_000}{"]" * 100_000}}}]}}', '{"poi', "too deeply"),
    "long number": Fault(HEAD + f'"x": {"9" * 5000}}}]}}', "9" * 5000, "a number is too long"),
    "query twice": Fault(GOOD, '"0"', "a query occurs twice", "query '0'"),
    "query of words": Fault('"x1": {}', '"x1"', "must be a plain decimal integer"),
    "leading zero": Fault('"01": {}', '"01"', "must be a plain decimal integer"),
    "negative query": Fault('"-0": {"pointer_candidates": []}', '"-0"', "plain decimal integer"),
    "list": Fault('"1": [3]', "[3]", "Expected `object`, got `array`", "query '1'"),
    "no candidates": Fault('"1": {"x": 5}', '{"x"', "missing required field `pointer_candidates`"),
    "reserved": Fault(HEAD + '"pointer": [1], "_lever": 1}]}', '{"poi', "_lever is reserved"),
    "other query": Fault(
        '"1": {"query": {"query_id": 22}, "pointer_candidates": []}', "22", "differs from the key"
    ),
    "no colon": Fault('"1" {"pointer_candidates": []}', '{"poi', "expected a colon"),
    "brackets": Fault('"1": {"pointer_candidates": [}}', "}}", "Expecting value", "query '1'"),
    "not UTF-8": Fault(HEAD + '"x": "\udcff"}]}', "\udcff", "not valid UTF-8", "query '1'"),
}


def run_ingest(text: bytes, folder: Path, salvage: bool = False) -> tuple[Run, list[str]]:
    path = folder / "f.json"
    path.write_bytes(text)
    said: list[str] = []
    options = IngestOptions(dataset="d", split="s", salvage=salvage, notice=said.append)
    (done,) = ingest([path], Store.create(folder / "store"), options)
    return done.run, said


def encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_to_the_byte_and_nothing_is_committed(
    fault: Fault, tmp_path: Path
) -> None:
    before = encode("{" + GOOD + ", ")
    text = before + encode(fault.text + ", " + MORE + "}")
    with pytest.raises(LeverError) as found:
        run_ingest(text, tmp_path)
    where = found.value.where or ""
    assert fault.what in found.value.message()
    assert fault.where in where
    assert str(tmp_path / "f.json") in where
    offset = int(where.split("byte ")[1].split(",")[0])
    assert text[offset:].startswith(encode(fault.at))
    assert offset >= len(before)
    assert Store.open(tmp_path / "store").runs() == []
    assert list((tmp_path / "store" / "staging").glob("[0-9a-f]*")) == []


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_salvage_keeps_what_is_whole_and_lists_the_rest(fault: Fault, tmp_path: Path) -> None:
    text = encode("{" + GOOD + ", " + fault.text + ", " + MORE + "}")
    run, said = run_ingest(text, tmp_path, salvage=True)
    is_one_row = "field pointer_candidates[1]" in fault.where and "twice" not in fault.what
    whole = 3 if is_one_row else 2  # an odd candidate costs that candidate, not its query
    assert run.rows == {"candidates": whole, "queries": whole}
    assert run.details["skipped"]["count"] == 1
    (reason,) = run.details["skipped"]["first"]
    assert fault.what in reason
    assert any(reason in line for line in said)
    assert run.parameters == {"salvage": True}


def test_of_a_query_with_odd_rows_salvage_keeps_the_others(tmp_path: Path) -> None:
    odd: dict[int, dict[str, object]] = {
        0: {"vqa_acc_score": 7},
        70: {"pointer": [1, 1]},
        71: {"vqa_correct": "x"},
    }
    rows = [{"pointer": [i], **odd.get(i, {})} for i in range(138)]
    text = json.dumps({"5": {"pointer_candidates": rows}}).encode()
    run, _ = run_ingest(text, tmp_path, salvage=True)
    assert run.rows == {"candidates": 135, "queries": 1}
    assert run.details["skipped"]["count"] == 3
    for reason, field in zip(
        run.details["skipped"]["first"],
        ("[0].vqa_acc_score", "[70].pointer", "[71].vqa_correct"),
        strict=True,
    ):
        assert f"query '5', field pointer_candidates{field}" in reason


def test_an_unknown_method_is_kept_and_named_once(tmp_path: Path) -> None:
    rows = [{"pointer": [i], "gen_method": m} for i, m in enumerate(["beam", "bema", "bema", None])]
    text = json.dumps({"5": {"pointer_candidates": rows}}).encode()
    run, said = run_ingest(text, tmp_path)
    assert run.rows["candidates"] == 4
    (line,) = [line for line in said if "gen_method" in line]
    assert 'unknown gen_method "bema": kept as it stands' in line


@pytest.mark.parametrize("cut", range(1, len(GOOD) + len(MORE) + 4))
def test_a_file_cut_anywhere_is_refused_and_its_whole_queries_salvaged(
    cut: int, tmp_path: Path
) -> None:
    whole = "{" + GOOD + ", " + MORE + "}"
    text = whole[:cut].encode()
    with pytest.raises(LeverError):
        run_ingest(text, tmp_path)
    if cut > len(GOOD):
        run, _ = run_ingest(text, tmp_path, salvage=True)
        assert run.rows["queries"] == (2 if cut >= len(whole) - 1 else 1)


@pytest.mark.long
def test_a_gzip_file_cut_short_says_so_and_can_be_salvaged(tmp_path: Path) -> None:
    members = ", ".join(MORE.replace('"7"', f'"{i}"') for i in range(20_000))
    packed = gzip.compress(("{" + members + "}").encode(), 1)
    with pytest.raises(LeverError) as found:
        run_ingest(packed[: len(packed) // 2], tmp_path)
    assert "the compressed data is damaged or cut short" in found.value.what
    assert f"compressed byte {len(packed) // 2}" in str(found.value.where)
    run, _ = run_ingest(packed[: len(packed) // 2], tmp_path, salvage=True)
    assert 5_000 < run.rows["queries"] < 15_000


@pytest.mark.long
def test_a_value_beyond_the_limit_is_refused_in_little_memory(tmp_path: Path) -> None:
    import resource

    long = '"x": "' + "a" * (VALUE_LIMIT + (8 << 20)) + '"}]}'
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LeverError, match="a single value is larger than 64 MB") as found:
        run_ingest(("{" + GOOD + ", " + HEAD + long + "}").encode(), tmp_path)
    assert f"byte {len(GOOD) + 8}" in str(found.value.where)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 4 * VALUE_LIMIT / (1 << 20)  # the test's own text is one and a half of them


@pytest.mark.parametrize("had_folder", [False, True])
def test_a_refused_first_ingest_leaves_no_store(tmp_path: Path, had_folder: bool) -> None:
    """Nor what it put there on its way; what else lay in the folder stays."""
    store = tmp_path / "store"
    if had_folder:
        (store / "images").mkdir(parents=True)
    (tmp_path / "bad.json").write_text('{"0": {"pointer_candidates": [{"pointer": [1, 1]}]}}')
    for path in (tmp_path / "bad.json", tmp_path / "missing.json"):
        with pytest.raises(LeverError), Store.to_fill(store) as opened:
            list(ingest([path], opened, IngestOptions(dataset="d", split="train")))
        assert [p.name for p in tmp_path.rglob("store/*")] == ["images"] * had_folder
        assert store.exists() == had_folder


def test_a_store_that_was_there_or_got_a_run_stays(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(f"{{{GOOD}}}")
    with pytest.raises(LeverError), Store.to_fill(tmp_path / "a") as opened:
        paths = [tmp_path / "good.json", tmp_path / "missing.json"]
        list(ingest(paths, opened, IngestOptions(dataset="d", split="train")))
    assert len(Store.open(tmp_path / "a").runs()) == 1
    Store.create(tmp_path / "b")
    with pytest.raises(LeverError), Store.to_fill(tmp_path / "b") as opened:
        list(ingest([tmp_path / "missing.json"], opened, IngestOptions()))
    assert Store.open(tmp_path / "b").runs() == []
