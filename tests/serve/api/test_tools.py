"""Calls of functions: what a model writes is parsed the same however it is cut, and nothing that it says is lost."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fulmen.config import UserError
from fulmen.serve.api.tools import CallParser, Part, describe_tools, require_call, write_calls, write_result
from fulmen.serve.structure import Grammars

NAMES = ("get_weather", "go")
CALL = '<function_call>```typescript\nfunctions.get_weather({"city": "Köln"})\n```'
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTIONS = [{"name": "get_weather", "description": "Of a city", "parameters": CITY}, {"name": "go"}]


def parse(text, cuts=()):
    """The parts of an answer that comes in pieces; neighbours of one kind are joined."""
    parser, parts = CallParser(NAMES), []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        parts += parser.push(text[start:end])
    joined = []
    for part in parts + parser.finish():
        assert part.text or part.name or part.arguments, "an empty part"
        if joined and joined[-1].call == part.call and not part.name:
            text, arguments = joined[-1].text + part.text, joined[-1].arguments + part.arguments
            joined[-1] = joined[-1]._replace(text=text, arguments=arguments)
        else:
            joined.append(part)
    return joined


def call(number, name, arguments):
    return Part(call=number, name=name, arguments=arguments)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("Just text.", [Part("Just text.")]),
        (CALL, [call(0, "get_weather", '{"city": "Köln"}')]),
        ("Let me look.\n" + CALL + "\n", [Part("Let me look.\n"), call(0, "get_weather", '{"city": "Köln"}')]),
        (CALL.removeprefix("<function_call>"), [call(0, "get_weather", '{"city": "Köln"}')]),
        ("```typescript\r\nfunctions.go( {} ) ;\r\n```", [call(0, "go", "{}")]),
        ("```typescript\nfunctions.go()\n```", [call(0, "go", "{}")]),
        (
            '```typescript\nfunctions.go({})\nfunctions.go({"a": [1, {}]})\n``` Done.',
            [call(0, "go", "{}"), call(1, "go", '{"a": [1, {}]}'), Part("Done.")],
        ),
        (
            "```typescript\nfunctions.go({})```" + CALL,
            [call(0, "go", "{}"), call(1, "get_weather", '{"city": "Köln"}')],
        ),
        ('```typescript\nfunctions.go({"a": "}\\")\\\\"})\n```', [call(0, "go", '{"a": "}\\")\\\\"}')]),
        # Not calls: other functions, other fences, beginnings.
        ("```typescript\nfunctions.other({})\n```", [Part("```typescript\nfunctions.other({})\n```")]),
        ("```typescript\nconst a = go({});\n```", [Part("```typescript\nconst a = go({});\n```")]),
        ("```python\nfunctions.go({})\n```", [Part("```python\nfunctions.go({})\n```")]),
        ("functions.go({})", [Part("functions.go({})")]),
        ("<function_call>nothing", [Part("<function_call>nothing")]),
        ("a < b `c` <function", [Part("a < b `c` <function")]),
        ("```typescript\nfunctions.go([1])\n```", [Part("```typescript\nfunctions.go([1])\n```")]),
        ("<<function_call>```typescript\nfunctions.go()\n```", [Part("<"), call(0, "go", "{}")]),
        # Broken ones: what was said is there, as arguments or as text.
        ('```typescript\nfunctions.go({"a": 1', [call(0, "go", '{"a": 1')]),
        ("```typescript\nfunctions.go({a: 1,})\n```", [call(0, "go", "{a: 1,}")]),
        ('```typescript\nfunctions.go({"a": "b\n```', [call(0, "go", '{"a": "b'), Part("\n```")]),
        ("```typescript\nfunctions.go({]})\n```", [call(0, "go", "{"), Part("]})\n```")]),
        ("```typescript\nfunctions.go({}, 2)\n```", [call(0, "go", "{}"), Part(", 2)\n```")]),
        ("```typescript\nfunctions.go({})\nx = 1\n```", [call(0, "go", "{}"), Part("\nx = 1\n```")]),
        (
            "```typescript\nfunctions.go({})\nfunctions.other({})\n```",
            [call(0, "go", "{}"), Part("\nfunctions.other({})\n```")],
        ),
        ("```typescript\nfunctions.go({})\nfunct", [call(0, "go", "{}"), Part("\nfunct")]),
        ("```typescript\nfunctions.go({})\n``", [call(0, "go", "{}")]),
    ],
)
def test_parts(text, parts):
    assert parse(text) == parts
    assert parse(text, range(1, len(text))) == parts


PIECES = [
    *CALL,
    CALL,
    "<function_call>",
    "```typescript\n",
    "functions.go(",
    "{}",
    ")",
    "\n",
    "```",
    "`",
    "<",
    '"',
    " " * 9,
]


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join), st.data())
def test_cuts_change_nothing(text, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=len(text) // 2)))
    whole = parse(text)
    assert parse(text, [cut for cut in cuts if cut < len(text)]) == whole


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_text_without_calls_is_untouched(text):
    parts = parse(text)
    if all(part.call is None for part in parts):
        assert "".join(part.text for part in parts) == text
    assert all(part.name in NAMES for part in parts if part.call is not None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(), JSON, max_size=3).map(json.dumps)), max_size=3
)


@given(st.sampled_from(["", "Hm. ", "``"]), CALLS)
def test_what_is_written_is_parsed(before, calls):
    parts = parse(before + write_calls(calls)) if calls else []
    assert [(part.name, part.arguments) for part in parts if part.call is not None] == calls
    assert "".join(part.text for part in parts) == (before if calls else "")


def test_what_is_held_back_is_bounded():
    parser = CallParser(NAMES)
    for text in [
        "<function_call>" + " " * 400,
        "```typescript\n" + "\n" * 400,
        "```typescript\nfunctions." + "a" * 400,
    ]:
        given_out = "".join(part.text for character in text for part in parser.push(character))
        assert len(given_out) > len(text) - 150
        parser.finish()


def test_arguments_are_given_out_as_they_come():
    parser = CallParser(NAMES)
    assert parser.push('```typescript\nfunctions.go({"a": "lo')[-1] == Part(call=0, arguments='{"a": "lo')
    assert parser.push("ng") == [Part(call=0, arguments="ng")]


def test_messages():
    assert describe_tools(FUNCTIONS) == {"role": "tools", "content": "\n".join(map(json.dumps, FUNCTIONS))}
    assert write_calls([("get_weather", '{"city": "Köln"}')]) == CALL
    assert write_result("go", '{"a": 1}') == {"role": "tool", "content": '{"name": "go", "response": {"a": 1}}'}
    assert write_result("go", 'said "no"') == {"role": "tool", "content": '{"name": "go", "response": "said \\"no\\""}'}


def follow(tokenizer, structure, text):
    """The first place of a text that a structure does not allow; None if it is a whole answer; its length if not."""
    matcher = Grammars(tokenizer).matcher(structure, [tokenizer.eos_id])
    row = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
    place = 0
    for token in tokenizer.encode(text):
        matcher.mask(row)
        if not row[token >> 5] >> (token & 31) & 1:
            return place
        matcher.advance(token)
        place += len(tokenizer.token_bytes(token))
    return None if matcher.is_done else place


def test_required_calls(tokenizer):
    free = require_call(FUNCTIONS, once=False)
    calls = [("get_weather", '{"city": "Bonn"}'), ("go", '{"any": [1]}')]
    for some in (calls[:1], calls[1:], calls):
        assert follow(tokenizer, free, write_calls(some)) is None
    assert follow(tokenizer, free, "Well") == 0
    unfit = write_calls([("get_weather", '{"town": 1}')])
    assert unfit[: follow(tokenizer, free, unfit)].endswith('get_weather({"')
    once = require_call(FUNCTIONS, once=True)
    assert follow(tokenizer, once, write_calls(calls[:1])) is None
    assert write_calls(calls)[follow(tokenizer, once, write_calls(calls)) :].startswith("functions.go")
    assert follow(tokenizer, require_call(FUNCTIONS[1:], once=True), write_calls(calls[:1])) is not None
    blanks = write_calls([("go", "{" + " " * 100 + "}")])
    assert follow(tokenizer, once, blanks) < len(blanks)


def nested(levels):
    return {"a": nested(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ([nested(80)], "nested too deeply"),
        ([{"x-guidance": {"lenient": True}}], "x-guidance"),
        ([{"description": "x" * 40_000}] * 2, "at most 65536 can be required"),
    ],
)
def test_schemas_that_cannot_be_required(parameters, message):
    functions = [{"name": f"f{number}", "parameters": schema} for number, schema in enumerate(parameters)]
    with pytest.raises(UserError, match=message):
        require_call(functions, once=True)
