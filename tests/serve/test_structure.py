"""Structured answers: whatever the logits say, what comes out has the form, and what cannot be done is refused."""

import json
import re

import jsonschema_rs
import numpy as np
import pytest
import torch

from fulmen.config import UserError
from fulmen.serve import structure as module
from fulmen.serve.sampling import NOTHING_LEFT, Draw, SamplingParams, sample
from fulmen.serve.structure import MAX_NESTING, MAX_SIZE, Grammars, Structure

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bé", 3, None]}, "maxItems": 3, "minItems": 1},
        "home": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "on": {"format": "date"}},
            "required": ["zip"],
            "additionalProperties": False,
        }
    },
}


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer)


def schema(value):
    return Structure("json_schema", json.dumps(value))


def allowed(matcher, size=320):
    row = np.full((size + 31) // 32, -1, np.int32)
    matcher.mask(row)
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


def feed(matcher, tokenizer, text):
    for token in tokenizer.encode(text):
        matcher.advance(token)
    return matcher


def answers(tokenizer, grammars, structure, count, steps=6000, vocab=320, spread=2.0, **settings):
    """Texts of random models: new random logits at each step, for `count` answers at once."""
    generator = torch.Generator().manual_seed(0)
    params = [
        SamplingParams(**{"seed": place, "temperature": 1.0, "structure": structure} | settings)
        for place in range(count)
    ]
    draws = {
        place: Draw(one, [5], matcher=grammars.matcher(structure, (tokenizer.eos_id,)))
        for place, one in enumerate(params)
    }
    said = {place: [] for place in draws}
    for _ in range(steps):
        logits = torch.randn(len(draws), vocab, generator=generator) * spread
        for (place, draw), drawn in zip(list(draws.items()), sample(logits, list(draws.values())), strict=True):
            assert drawn.error is None
            if drawn.token == tokenizer.eos_id:
                assert draw.is_done
                del draws[place]
            else:
                said[place].append(drawn.token)
        if not draws:
            break
    assert not draws
    return [b"".join(map(tokenizer.token_bytes, tokens)).decode() for tokens in said.values()]


class TestRandomModels:
    @pytest.mark.parametrize("settings", [{}, {"top_p": 0.5}, {"temperature": 0}, {"repetition_penalty": 1.5}])
    def test_a_schema_is_fulfilled(self, tokenizer, grammars, settings):
        validator = jsonschema_rs.Draft202012Validator(PERSON, validate_formats=True)
        texts = answers(tokenizer, grammars, schema(PERSON), 24, **settings)
        for text in texts:
            validator.validate(json.loads(text))
        assert len(set(texts)) > 20

    def test_any_object(self, tokenizer, grammars):
        for text in answers(tokenizer, grammars, Structure("json_object"), 24):
            assert isinstance(json.loads(text), dict)

    def test_an_expression_matches_the_whole_answer(self, tokenizer, grammars):
        expression = r"(GET|POST) /[a-zé]{1,8}(\?x=[0-9]+)? [0-9]{3}"
        for text in answers(tokenizer, grammars, Structure("regex", expression), 24):
            assert re.fullmatch(expression, text)

    def test_choices(self, tokenizer, grammars):
        choices = ["yes", "yes, but", 'a "no"\n', "é🎉 /\\", ""]
        texts = answers(tokenizer, grammars, Structure("choice", json.dumps(choices)), 40)
        assert set(texts) == set(choices)

    def test_a_model_with_more_tokens_than_the_tokenizer(self, tokenizer, grammars):
        for text in answers(tokenizer, grammars, schema({"type": "integer", "maximum": 999}), 8, vocab=411):
            int(text)

    def test_blanks_do_not_go_on_for_ever(self, tokenizer, grammars):
        """A model that wants nothing but blanks."""
        structure = schema({"type": "array", "items": {"enum": [1, 2]}, "minItems": 3})
        matcher = grammars.matcher(structure, (tokenizer.eos_id,))
        draw = Draw(SamplingParams(temperature=0, structure=structure), (), matcher=matcher)
        logits = torch.zeros(1, 320)
        for token in range(320):
            if tokenizer.token_bytes(token).isspace():
                logits[0, token] = 9.0
        said = b"".join(tokenizer.token_bytes(sample(logits, [draw])[0].token) for _ in range(120))
        assert max(map(len, re.findall(rb"\s+", said))) == 32
        assert len(said.split()) == 4


class TestMatcher:
    def test_ends_are_allowed_exactly_when_it_is_complete(self, tokenizer, grammars):
        matcher = grammars.matcher(Structure("regex", "ab+"), (tokenizer.eos_id, 300))
        a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
        assert allowed(matcher) == {a}
        matcher.advance(a)
        assert (allowed(matcher), matcher.is_done) == ({b}, False)
        matcher.advance(b)
        assert (allowed(matcher), matcher.is_done) == ({b, tokenizer.eos_id, 300}, False)
        matcher.advance(300)
        assert (allowed(matcher), matcher.is_done, matcher.error) == (set(), True, None)

    def test_a_complete_answer_has_only_ends_left(self, tokenizer, grammars):
        matcher = feed(grammars.matcher(Structure("json_object"), (tokenizer.eos_id,)), tokenizer, '{"a": [1, {}]}')
        assert matcher.is_done
        assert allowed(matcher) == {tokenizer.eos_id}

    def test_an_end_token_that_is_text_too_is_an_end(self, tokenizer, grammars):
        quote = tokenizer.encode('"')[0]
        matcher = grammars.matcher(Structure("regex", '"a"'), (quote,))
        assert allowed(matcher) == set()
        matcher = grammars.matcher(Structure("regex", "a"), (quote,))
        assert allowed(feed(matcher, tokenizer, "a")) == {quote}

    def test_special_tokens_are_no_text(self, tokenizer, grammars):
        matcher = grammars.matcher(Structure("regex", r"(.|\n)*"), ())
        assert not allowed(matcher) & {tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_id}
        # All but these three and the bytes that begin no character.
        assert len(allowed(matcher)) > 200

    def test_rows_of_any_size(self, tokenizer, grammars):
        eos = tokenizer.eos_id
        for size in (32, 64, 320, 330, 5000):
            matcher = feed(grammars.matcher(Structure("regex", "a+"), (eos, 4000)), tokenizer, "a")
            expected = {tokenizer.encode("a")[0], eos, 4000}
            assert allowed(matcher, size) == {token for token in expected if token < -(-size // 32) * 32}

    def test_a_token_that_was_not_allowed_is_an_error(self, tokenizer, grammars):
        matcher = feed(grammars.matcher(Structure("regex", "ab"), (tokenizer.eos_id,)), tokenizer, "x")
        assert "doesn't satisfy the grammar" in matcher.error
        assert allowed(matcher) == set()
        assert not matcher.is_done

    def test_matchers_are_independent(self, tokenizer, grammars):
        one, two = (grammars.matcher(Structure("regex", "ab"), ()) for _ in range(2))
        feed(one, tokenizer, "a")
        assert allowed(two) == {tokenizer.encode("a")[0]}


class TestRows:
    def test_only_the_row_with_a_structure_is_masked(self, tokenizer, grammars):
        structure = Structure("regex", "[0-9]")
        free = Draw(SamplingParams(temperature=0), ())
        bound = Draw(
            SamplingParams(temperature=0, structure=structure, logprobs=1),
            (),
            matcher=grammars.matcher(structure, (tokenizer.eos_id,)),
        )
        logits = torch.zeros(2, 320)
        logits[:, 5] = 10.0
        logits[:, tokenizer.encode("7")[0]] = 1.0
        got = sample(logits, [free, bound])
        assert (got[0].token, tokenizer.decode([got[1].token])) == (5, "7")
        # The alternatives are the model's own.
        assert got[1].logprobs.top[0][0] == 5
        assert not free.is_done
        assert bound.is_done

    def test_what_cannot_go_on_ends_itself_alone(self, tokenizer, grammars):
        structure = Structure("regex", "ab")

        def draw(text):
            matcher = feed(grammars.matcher(structure, ()), tokenizer, text)
            return Draw(SamplingParams(temperature=0, structure=structure), (), matcher=matcher)

        got = sample(torch.zeros(3, 320), [draw("x"), draw("ab"), draw("a")])
        assert "the structure cannot go on: " in got[0].error
        assert got[1].error == NOTHING_LEFT
        assert tokenizer.decode([got[2].token]) == "b"

    def test_a_limit_that_is_reached_on_the_way(self, tokenizer, grammars):
        """The library gives up on this one after a few tokens."""
        structure = Structure("regex", "((((a{1,100}){1,100}){1,100}){1,100}){1,100}")
        draw = Draw(SamplingParams(structure=structure), (), matcher=grammars.matcher(structure, ()))
        logits = torch.zeros(1, 320)
        drawn = [sample(logits, [draw])[0] for _ in range(40)]
        assert drawn[0].token is not None
        assert drawn[-1].error == "the structure cannot go on: lexer error: too many expressions constructed"


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        ("xml", "", "the kind of a structure must be one of json_schema, json_object, regex, choice, got 'xml'"),
        ("json_object", "{}", "a json_object has no text"),
        ("json_schema", "{", "the json_schema is not JSON: "),
        ("json_schema", "3", "a json_schema must be an object, got int"),
        ("json_schema", "true", "a json_schema must be an object, got bool"),
        ("json_schema", "[" * 100_000, "the json_schema has 100000 bytes; at most 65536 are allowed"),
        ("json_schema", "[" * 60_000, "the json_schema is nested too deeply: at most 64 levels"),
        ("json_schema", '{"enum": [' + "9" * 5000 + "]}", "the json_schema is not JSON: Exceeds the limit"),
        ("json_schema", '{"x-guidance": {"lenient": true}}', "a json_schema must not hold x-guidance"),
        ("regex", "a" * (MAX_SIZE + 1), f"the regex has {MAX_SIZE + 1} bytes"),
        ("regex", "\ud800", "the regex holds a lone surrogate"),
        ("choice", "[]", "a choice must be a JSON list of one string or more"),
        ("choice", "[1]", "a choice must be a JSON list of one string or more"),
        ("choice", '"ab"', "a choice must be a JSON list of one string or more"),
    ],
)
def test_text_that_cannot_be_read(kind, value, reason):
    with pytest.raises(UserError, match=re.escape(reason)):
        Structure(kind, value)


def test_nesting_up_to_the_limit(grammars):
    def nested(levels):
        value = {}
        for _ in range(levels - 1):
            value = {"items": value}
        return value

    grammars.matcher(schema(nested(MAX_NESTING)), ())
    with pytest.raises(UserError, match="nested too deeply"):
        schema(nested(MAX_NESTING + 1))


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        (schema({"type": "array", "uniqueItems": True}), 'the json_schema cannot be used: Unimplemented keys: ["uniq'),
        (schema({"properties": {"a": {"not": {}}}}), 'Unimplemented keys: ["not"]'),
        (schema({"type": "text"}), "Invalid type: text"),
        (schema({"type": "string", "format": "shoe"}), "Unknown format: shoe"),
        (schema({"oneOf": [{"minimum": 1}, {"maximum": 5}]}), "oneOf constraints are not supported"),
        (schema({"$ref": "https://example.com/a.json"}), "Default retriever does not fetch resources"),
        (schema({"$ref": "#/nowhere"}), "Pointer '/nowhere' does not exist"),
        (schema({"$ref": "#"}), "NoExtension"),
        (schema({"enum": []}), "Unsatisfiable schema: anyOf is empty"),
        (schema({"items": False, "minItems": 1, "type": "array"}), "Unsatisfiable schema: "),
        (schema({"type": "string", "pattern": "(?=a)"}), "look-around, including look-ahead"),
        (Structure("json_schema", '{"minimum": NaN}'), "the json_schema cannot be used: expected value"),
        (Structure("regex", "("), "the regex cannot be used: unclosed group"),
        (Structure("regex", r"\bword"), "lookarounds not supported yet"),
        (Structure("regex", r"(a)\1"), "backreferences are not supported"),
        (Structure("choice", r'["\ud800"]'), "the choice cannot be used: "),
    ],
)
def test_what_is_not_supported_or_wrong_is_refused(grammars, structure, reason):
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        grammars.matcher(structure, ())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_grammars_are_compiled_once_and_not_kept_for_ever(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "KEPT_GRAMMARS", 2)
    grammars, compiled = Grammars(tokenizer), []
    real = grammars._compile
    monkeypatch.setattr(grammars, "_compile", lambda structure: compiled.append(structure.value) or real(structure))
    for text in ("a", "b", "a", "c", "a", "b"):
        grammars.matcher(Structure("regex", text), ())
    assert compiled == ["a", "b", "c", "b"]


def test_without_llguidance(tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(UserError, match=re.escape('structured answers need llguidance: pip install "fulmen[serve]"')):
        Grammars(tokenizer).matcher(Structure("json_object"), ())
