"""Functions that a model may call, in the released models' own format (minimax-01.md section 11).

The functions on offer are a turn of the role "tools", one JSON object a line. A call is part of the assistant's text:

    <function_call>```typescript
    functions.NAME({"argument": "value"})
    ```

with one line for each call. What a function returned is a turn of the role "tool".
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fulmen.config import UserError
from fulmen.serve.structure import MAX_SIZE, WHITESPACE, Structure

OPENING, FENCE, END = "<function_call>", "```typescript\n", "```"

NAME = "[a-zA-Z0-9_-]{1,64}"
# Blanks are bounded so that what is held back is, too.
BLANKS, SPACES = r"\s{0,16}", r"[ \t]{0,16}"
CALL = [*map(re.escape, "functions."), NAME, BLANKS, r"\(", BLANKS, r"[{)]"]
FENCED_CALL = [*map(re.escape, "```typescript"), SPACES, r"\r?", r"\n", BLANKS, *CALL]


class Part(NamedTuple):
    """A piece of an answer: text, or of the call number `call` its name (once, at its beginning) or more arguments."""

    text: str = ""
    call: int | None = None
    name: str = ""
    arguments: str = ""


def describe_tools(functions: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The message that offers these functions, of which each has `name` and may have `description`, `parameters`."""
    return {"role": "tools", "content": "\n".join(_dump(function) for function in functions)}


def write_calls(calls: Sequence[tuple[str, str]]) -> str:
    """The text by which a model calls functions: (name, arguments as JSON) each."""
    lines = "".join(f"functions.{name}({arguments})\n" for name, arguments in calls)
    return OPENING + FENCE + lines + END


def write_result(name: str, content: str) -> dict[str, str]:
    """The message that gives back what a function returned; JSON goes in as it is, other text as a JSON string."""
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        content = _dump(content)
    return {"role": "tool", "content": f'{{"name": {_dump(name)}, "response": {content}}}'}


@dataclass(frozen=True)
class CallGrammar(Structure):
    """A structure whose value is in llguidance's Lark notation, which no client writes."""

    def __post_init__(self) -> None:
        size = len(self.value.encode())
        if size > MAX_SIZE:
            raise UserError(f"the parameters of the functions have {size} bytes; at most {MAX_SIZE} can be required")

    def grammar(self) -> str:
        from llguidance import LLMatcher

        return LLMatcher.grammar_from_lark(self.value)


def require_call(functions: Sequence[Mapping[str, Any]], *, once: bool) -> Structure:
    """The structure of an answer that calls some of these functions, with arguments that fit their schemas.

    once: one call and no more. Raises UserError for a schema that cannot be used.
    """
    kinds, rules = [], []
    for number, function in enumerate(functions):
        schema = function.get("parameters") or {"type": "object"}
        Structure("json_schema", _dump(schema))  # its checks
        schema = {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}
        kinds.append(f'"{function["name"]}(" arguments_{number}')
        rules.append(f"arguments_{number}: %json {_dump(schema)}")
    start = f"start: {_dump(OPENING + FENCE)} call{'' if once else '+'} {_dump(END)}"
    call = f'call: "functions." ({" | ".join(kinds)}) ")\\n"'
    return CallGrammar("calls of functions", "\n".join([start, call, *rules]))


class CallParser:
    """Finds the calls in an answer that comes in pieces of any size; the parts do not depend on how it is cut.

    A call begins where one of the functions on offer is called in a fence, with or without `<function_call>`, which a
    tokenizer may treat as special. Its arguments are handed on as they come and as they are, up to the end of their
    object; anything that is not a call is text. Only blanks around calls are left out.
    """

    def __init__(self, names: Collection[str]):
        self._names = frozenset(names)
        self._held = ""
        self._state = self._in_text
        self._scanner = _ObjectEnd()
        self.calls = 0

    def push(self, text: str) -> list[Part]:
        """What is decided by this further text."""
        self._held += text
        return list(self._run(is_last=False))

    def finish(self) -> list[Part]:
        """What was held back: the answer has ended."""
        return list(self._run(is_last=True))

    def _run(self, is_last: bool) -> Iterator[Part]:
        while self._held:
            before = (self._state, len(self._held))
            yield from self._state(is_last)
            if before == (self._state, len(self._held)):
                return

    def _in_text(self, is_last: bool) -> Iterator[Part]:
        for place in (match.start() for match in _CANDIDATE.finditer(self._held)):
            start = _FENCED if self._held[place] == "`" else _OPENED
            found = start.whole.match(self._held, place)
            if found and found["name"] in self._names:
                if place:
                    yield Part(self._held[:place])
                yield from self._begin(found)
                return
            if not found and not is_last and start.partial.match(self._held, place):
                if place:
                    yield Part(self._held[:place])
                self._held = self._held[place:]
                return
        yield Part(self._held)
        self._held = ""

    def _begin(self, found: re.Match) -> Iterator[Part]:
        """Begin a call; the match ends with the first character of its arguments or the bracket behind none."""
        yield Part(call=self.calls, name=found["name"])
        self._held = self._held[found.end() - 1 :]
        self._scanner = _ObjectEnd()
        self._state = self._in_arguments
        self.calls += 1
        if self._held.startswith(")"):
            yield Part(call=self.calls - 1, arguments="{}")
            self._state = self._after_arguments

    def _in_arguments(self, is_last: bool) -> Iterator[Part]:
        end = self._scanner.push(self._held)
        if end:
            yield Part(call=self.calls - 1, arguments=self._held[:end])
        self._held = self._held[end:]
        if self._scanner.is_whole:
            self._state = self._after_arguments
        elif self._held:
            self._state = self._in_text

    def _after_arguments(self, is_last: bool) -> Iterator[Part]:
        yield from self._after(_CLOSED, is_last, self._between)

    def _between(self, is_last: bool) -> Iterator[Part]:
        found = _ANOTHER.whole.match(self._held)
        if found and found["name"] in self._names:
            yield from self._begin(found)
        elif not found and not is_last and _ANOTHER.partial.match(self._held):
            return
        else:
            yield from self._after(_ENDED, is_last, self._behind)

    def _after(self, expected: "_Pattern", is_last: bool, then: Any) -> Iterator[Part]:
        """Skip what is expected; if something else comes, it is text. The end may come before all of it is there."""
        if found := expected.whole.match(self._held):
            self._held, self._state = self._held[found.end() :], then
        elif not expected.partial.match(self._held):
            self._state = self._in_text
        elif is_last:
            self._held = ""
        yield from ()

    def _behind(self, is_last: bool) -> Iterator[Part]:
        self._held = self._held.lstrip()
        if self._held:
            self._state = self._in_text
        yield from ()


class _ObjectEnd:
    """Finds the end of a JSON object that comes in pieces, by its brackets and strings."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self._in_string = self._is_escaped = False
        self.is_whole = False

    def push(self, text: str) -> int:
        """How many characters belong to the object. Where these are not all and it is not whole, it is none."""
        for place, character in enumerate(text):
            if self._in_string:
                if character == "\n":
                    return place
                self._in_string = self._is_escaped or character != '"'
                self._is_escaped = not self._is_escaped and character == "\\"
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._open.append("}" if character == "{" else "]")
            elif character in "}]":
                if self._open.pop() != character:
                    return place
                if not self._open:
                    self.is_whole = True
                    return place + 1
        return len(text)


class _Pattern:
    """Elements in a row, each a character or a bounded repetition, as an expression for all and one for a beginning."""

    def __init__(self, elements: Sequence[str]):
        whole = "".join(f"(?P<name>{element})" if element == NAME else element for element in elements)
        self.whole = re.compile(whole)
        nested = ""
        for element in reversed(elements):
            nested = f"(?:{element}{nested})?"
        self.partial = re.compile(nested + r"\Z")


_CANDIDATE = re.compile("[<`]")
_FENCED = _Pattern(FENCED_CALL)
_OPENED = _Pattern([*map(re.escape, OPENING), BLANKS, *FENCED_CALL])
_CLOSED = _Pattern([BLANKS, r"\)"])
_ANOTHER = _Pattern([SPACES, ";?", BLANKS, *CALL])
_ENDED = _Pattern([SPACES, ";?", BLANKS, *END])


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
