"""Answers of a given form: grammars that say which tokens may come next, compiled and followed by llguidance."""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fulmen.config import UserError
from fulmen.data import Tokenizer

KINDS = ("json_schema", "json_object", "regex", "choice")
MAX_SIZE = 64 * 1024
"""Bytes of a schema, an expression or the choices."""
MAX_NESTING = 64
"""Objects and lists within each other in a schema."""
KEPT_GRAMMARS = 32
"""Compiled grammars that are kept for the next requests."""
# A small model may write blanks for ever where any number of them is allowed.
WHITESPACE = r"[ \t\r\n]{1,32}"


@dataclass(frozen=True)
class Structure:
    """What an answer must look like: one of `KINDS`, and the text that says it.

    json_schema: a JSON schema (2020-12) as JSON text, an object; json_object: no text, any JSON object; regex: an
    expression that matches the whole answer, without look-around or back references, in which `\\d` and `\\w` mean
    all digits and letters of Unicode; choice: a JSON list of the strings to choose from.
    Raises UserError for text that cannot be read or exceeds the limits; `Grammars.matcher` says what else is wrong.
    """

    kind: str
    value: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"the kind of a structure must be one of {', '.join(KINDS)}, got {self.kind!r:.60}")
        try:
            size = len(self.value.encode())
        except UnicodeEncodeError:
            raise UserError(f"the {self.kind} holds a lone surrogate, which is no text") from None
        if size > MAX_SIZE:
            raise UserError(f"the {self.kind} has {size} bytes; at most {MAX_SIZE} are allowed")
        if self.kind == "json_object" and self.value:
            raise UserError("a json_object has no text: any object will do; for a certain one use json_schema")
        if self.kind == "json_schema":
            _check_schema(self._parsed())
        if self.kind == "choice":
            _check_choices(self._parsed())

    def grammar(self) -> str:
        """The grammar in llguidance's own notation."""
        from llguidance import LLMatcher

        if self.kind == "regex":
            return LLMatcher.grammar_from_regex(self.value)
        if self.kind == "choice":
            return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in self._parsed()))
        schema = self.value if self.kind == "json_schema" else '{"type": "object"}'
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})

    def _parsed(self) -> Any:
        try:
            return json.loads(self.value)
        except RecursionError:
            raise UserError(f"the {self.kind} is nested too deeply: at most {MAX_NESTING} levels") from None
        except ValueError as error:
            raise UserError(f"the {self.kind} is not JSON: {error}") from None


class Grammars:
    """Compiled grammars over one tokenizer's vocabulary; the last used are kept. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._vocabulary = None
        self._kept: OrderedDict[Structure, Any] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, structure: Structure, eos_ids: Iterable[int]) -> "Matcher":
        """A new matcher at the beginning of an answer that ends with one of `eos_ids`.

        Raises UserError with llguidance's reason for a schema or an expression that is wrong, that no answer can
        fulfil, or of which something is not supported; and if llguidance is not installed. Takes up to a second.
        """
        with self._lock:
            grammar = self._kept.get(structure)
            if grammar is None:
                grammar = self._compile(structure)
                self._kept[structure] = grammar
                while len(self._kept) > KEPT_GRAMMARS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(structure)
            return Matcher(grammar.deep_copy(), eos_ids, self._tokenizer.vocab_size)

    def _compile(self, structure: Structure) -> Any:
        try:
            from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
        except ImportError as error:
            raise UserError('structured answers need llguidance: pip install "fulmen[serve]"') from error

        if self._vocabulary is None:
            self._vocabulary = LLTokenizer(TokenizerWrapper(_Vocabulary(self._tokenizer)))
        limits = LLParserLimits(verbose_errors=False)  # the verbose ones hold the parser's whole state
        try:
            grammar = LLMatcher(self._vocabulary, structure.grammar(), log_level=0, limits=limits)
        except ValueError as error:
            raise UserError(f"the {structure.kind} cannot be used: {_reason(str(error))}") from None
        # That nothing fulfils a grammar may show at the first token only, as of a schema that only refers to itself.
        trial = grammar.deep_copy()
        if not trial.is_error():
            trial.compute_bitmask()
        if trial.is_error():
            raise UserError(f"the {structure.kind} cannot be used: {_reason(trial.get_error())}")
        if grammar.get_grammar_warnings():
            raise UserError(f"the {structure.kind} cannot be used: {_reason(grammar.get_grammar_warnings()[0])}")
        return grammar


class Matcher:
    """Where one answer is in its grammar."""

    def __init__(self, grammar: Any, eos_ids: Iterable[int], vocab_size: int):
        """grammar: an `LLMatcher` over the vocabulary and one end token of its own behind it, `vocab_size`."""
        self._grammar, self._eos_ids, self._end = grammar, frozenset(eos_ids), vocab_size
        self._has_ended = False

    @property
    def is_done(self) -> bool:
        """Whether the answer is complete, so that nothing but an end token can follow."""
        return self._has_ended or (self.error is None and self._grammar.is_stopped())

    @property
    def error(self) -> str | None:
        """Why the answer cannot go on, None if it can: a token that was not allowed, or a limit of llguidance."""
        return _reason(self._grammar.get_error()) if self._grammar.is_error() else None

    def mask(self, row: np.ndarray) -> None:
        """Set the bits of the tokens that may come next, and no others, in a row of ceil(V / 32) int32.

        End tokens may come exactly when the answer is complete, even those that are text too. None may after an error.
        """
        row[:] = 0
        if self._has_ended:
            return
        bits = np.frombuffer(self._grammar.compute_bitmask(), np.int32).copy()
        if self._grammar.is_error():
            return
        is_complete = bits[self._end >> 5] >> (self._end & 31) & 1
        shared = min(len(bits), len(row))
        row[:shared] = bits[:shared]
        for token in (self._end, *self._eos_ids):
            if token >> 5 < len(row):
                _set_bit(row, token, bool(is_complete) and token in self._eos_ids)

    def advance(self, token: int) -> None:
        """Go on by a token; one that was not allowed is an `error`."""
        if token in self._eos_ids:
            self._has_ended = True
        else:
            self._grammar.consume_token(token)


class _Vocabulary:
    """A tokenizer as llguidance wants it. Its only end token is a new last one, as each request has its own ends."""

    def __init__(self, tokenizer: Tokenizer):
        size = tokenizer.vocab_size
        self.tokens = [*map(tokenizer.token_bytes, range(size)), b""]
        self.eos_token_id, self.bos_token_id, self.special_token_ids = size, None, [size]
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode())


def _set_bit(row: np.ndarray, token: int, value: bool) -> None:
    bit = np.uint32(1 << (token & 31))
    unsigned = row.view(np.uint32)
    unsigned[token >> 5] = unsigned[token >> 5] | bit if value else unsigned[token >> 5] & ~bit


def _check_schema(schema: Any) -> None:
    if not isinstance(schema, dict):
        raise UserError(f"a json_schema must be an object, got {type(schema).__name__}")
    if _nesting(schema) > MAX_NESTING:
        raise UserError(f"the json_schema is nested too deeply: at most {MAX_NESTING} levels")
    # With it a schema could have its own unsupported parts ignored.
    if "x-guidance" in schema:
        raise UserError("a json_schema must not hold x-guidance: how it is read is not a matter of the schema")


def _check_choices(choices: Any) -> None:
    if not isinstance(choices, list) or not choices or not all(isinstance(text, str) for text in choices):
        raise UserError("a choice must be a JSON list of one string or more")


def _nesting(value: Any) -> int:
    """Levels of objects and lists."""
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
        depth += 1
    return depth


def _reason(error: str) -> str:
    """The lines of llguidance's message that say what is wrong; the others point into the grammar."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["no reason given"]
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    where = [f"({line})" for line in lines if line.startswith("while processing ")]
    reason = " ".join([(named or lines)[0], *where])
    return reason if len(reason) <= 300 else reason[:297] + "..."
