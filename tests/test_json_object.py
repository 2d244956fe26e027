"""Streaming JSON: members, offsets and blocks against the standard parser."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lever_data.errors import LeverError
from lever_data.readers import json_exact
from lever_data.readers.json_object import Scanner
from lever_data.sources.decode import split_blocks
from tests.legacy_strategies import ANYTHING, null_non_finite


def feeder(text: bytes, size: int) -> Callable[[], bytes]:
    stream = io.BytesIO(text)
    return lambda: stream.read(size)


def members(text: bytes, size: int) -> dict[str, Any]:
    """The object's members by the scanner, each parsed by the standard parser."""
    scanner = Scanner(feeder(text, size), "file")
    found = {}
    scanner.skip_bom()
    going = scanner.enter(b"{", "an object")
    while going:
        member = scanner.member()
        start, end = member.value_offset, member.value_offset + len(member.value)
        assert text[start:end] == member.value
        assert text[member.key_offset :].startswith(member.key)
        found[json.loads(member.key)] = json.loads(member.value)
        going = scanner.more(b"}")
    scanner.finish()
    return found


@pytest.mark.slow
@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=5), ANYTHING, max_size=5),
    st.integers(1, 50),
    st.sampled_from([None, 0, 3]),
)
def test_members_are_those_of_the_standard_parser(
    value: dict[str, Any], size: int, indent: int | None
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=True).encode()
    assert null_non_finite(members(text, size)) == null_non_finite(json.loads(text))


@settings(deadline=None)
@given(ANYTHING)
def test_the_exact_parser_nulls_what_is_not_finite(value: Any) -> None:
    text = json.dumps(value).encode()
    found, _ = json_exact.parse(text, json_exact.Place("file", 0))
    assert found == null_non_finite(json.loads(text))


@pytest.mark.slow
@settings(deadline=None)
@given(ANYTHING)
def test_every_value_is_found_at_its_path(value: Any) -> None:
    text = json.dumps(null_non_finite(value), indent=1).encode()
    for path, start, _ in json_exact.walk(text):
        wanted = json.loads(text)
        for part in path:
            wanted = wanted[part]
        found, _ = json.JSONDecoder().raw_decode(text[start:].decode())
        assert found == wanted


@given(st.integers(1, 100), st.integers(0, 40))
def test_blocks_together_are_the_text(size: int, count: int) -> None:
    text = json.dumps({str(i): {"v": {"a": "}, "}} for i in range(count)}, indent=1).encode()
    blocks = list(split_blocks(io.BytesIO(text).read, size))
    assert b"".join(b.data for b in blocks) == text
    assert [b.offset for b in blocks] == [
        sum(len(b.data) for b in blocks[:i]) for i in range(len(blocks))
    ]
    assert [b.first for b in blocks] == [True] + [False] * (len(blocks) - 1)
    assert blocks[-1].last


@given(st.integers(100, 300), st.integers(0, 60), st.sampled_from([b"", b"\xef\xbb\xbf"]))
def test_blocks_as_objects_hold_every_member_once(size: int, count: int, mark: bytes) -> None:
    file = {str(i): {"v": {"a": "}, "}} for i in range(count)}
    members: list[tuple[str, Any]] = []
    for block in split_blocks(io.BytesIO(mark + json.dumps(file, indent=1).encode()).read, size):
        parts = block.as_object()
        assert parts is not None
        members += json.loads(b"".join(parts)).items()
    assert members == list(file.items())


@pytest.mark.parametrize(
    ("text", "offset", "what"),
    [
        (b'{"a": 1 "b": 2}', 8, "expected , or }"),
        (b'{"a" 1}', 5, "expected a colon"),
        (b"{a: 1}", 1, 'expected a key in "quotes"'),
        (b'{"a": 1,}', 8, 'expected a key in "quotes"'),
        (b'{"a": }', 6, "expected a value"),
        (b'{"a": 1} x', 9, "something follows the end"),
        (b'{"a": "x', 6, "ends in the middle of a value"),
        (b'{"a": [1, {"b": "]"}', 6, "ends in the middle of a value"),
        (b'{"a": 1', 7, "ends in the middle of a value"),
        (b"[]", 0, "expected an object"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 1000])
def test_faults_between_values_have_their_offset(
    text: bytes, offset: int, what: str, size: int
) -> None:
    with pytest.raises(LeverError) as found:
        members(text, size)
    assert what in found.value.what
    assert found.value.where == f"file, byte {offset}"


def test_a_list_is_walked_item_by_item() -> None:
    scanner = Scanner(feeder(b'[1, "a]", {"b": []} ,null ]', 3), "file")
    found = []
    going = scanner.enter(b"[", "a list")
    while going:
        found.append(scanner.value())
        going = scanner.more(b"]")
    scanner.finish()
    assert found == [(1, b"1"), (4, b'"a]"'), (10, b'{"b": []}'), (21, b"null")]
