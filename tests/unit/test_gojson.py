"""JSON as Go reads it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.core import gojson

JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**64 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(JSON_VALUES)
def test_ordinary_documents_are_read_as_they_are(value: Any) -> None:
    text = json.dumps(value, allow_nan=False) if "inf" not in repr(value) else "0"
    assert gojson.load(text) == gojson.load(text.encode()) == json.loads(text)


def test_repeated_keys_are_remembered_in_order() -> None:
    document = gojson.load('{"a":1,"b":2,"a":{"c":3,"c":4}}')
    assert document == {"a": {"c": 4}, "b": 2}
    assert [key for key, _ in gojson.members(document)] == ["a", "b", "a"]
    assert list(gojson.members(document["a"])) == [("c", 3), ("c", 4)]
    assert list(gojson.members({"x": 1})) == [("x", 1)]


@pytest.mark.parametrize(("text", "kind"), [("18446744073709551615", int), ("100000000000000000000", float)])
def test_integers_end_where_64_bits_do(text: str, kind: type) -> None:
    value = gojson.load(text)
    assert type(value) is kind
    assert value == int(text)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_depth(opening: str) -> None:
    closing = "]" if opening == "[" else "}"

    def nested(levels: int) -> str:
        return opening * (levels - 1) + "[]" + closing * (levels - 1)

    gojson.load(nested(gojson.MAX_DEPTH))
    gojson.load(f"[{nested(gojson.MAX_DEPTH - 1)}, []]")
    for levels in (gojson.MAX_DEPTH + 1, 100, 5_000, 200_000):
        with pytest.raises(ValueError, match=r"^nested more than 64 levels deep$"):
            gojson.load(nested(levels))


def test_half_a_character_is_no_text() -> None:
    assert gojson.load('["\\ud83d\\ude00"]') == ["\U0001f600"]
    for text in ('["\\ud83d"]', '{"\\ude00":1}'):
        with pytest.raises(ValueError, match=r"^not JSON text"):
            gojson.load(text)


@pytest.mark.parametrize(
    "value",
    [[[]] * 1000, {str(number): {"a": [1]} for number in range(1000)}, "[" * 1000],
    ids=["list", "object", "text"],
)
def test_width_is_not_depth(value: Any) -> None:
    assert gojson.load(json.dumps(value)) == value


def test_show_is_short_and_printable() -> None:
    assert gojson.show("x" * 58) == '"' + "x" * 58 + '"'
    assert gojson.show("x" * 59) == '"' + "x" * 56 + "..."
    assert gojson.show({"é\n": None}) == '{"\\u00e9\\n": null}'
