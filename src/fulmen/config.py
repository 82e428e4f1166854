"""Recipes: TOML files read into keyword-only dataclasses, overridden from the command line, checked, printed.

A room describes its settings as a dataclass; this module knows none of them. A misspelt key, a value of the wrong type
or a missing file becomes one `UserError` that names the key and the way out.
"""

import copy
import dataclasses
import difflib
import math
import os.path
import reprlib
import tomllib
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w

RECIPES = Path(__file__).parent / "recipes"
"""The folder of the recipes that the package ships."""

T = TypeVar("T")

_EXPECTED = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string (in quotes)",
    dict: "a table of keys and values",
}


class UserError(ValueError):
    """Something that the person at the keyboard can mend: one clear line, no traceback, exit code 2."""


def check_numbers(settings: Any, rule: str, holds: Callable[[float], bool], *names: str) -> None:
    """Raise UserError for the first of these numbers of `settings` that is not finite or for which `holds` is false.

    `rule` says what it must be, such as "at least 0". None is no number, and passes.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not (math.isfinite(value) and holds(value)):
            raise UserError(f"{name} must be {rule}, got {value}")


def find_recipe(name: str | Path) -> Path:
    """Return the recipe file that `name` means: a path, or the name of a shipped recipe (`quickstart`, `marl/sparse`).

    A shipped recipe is also found as `recipes/marl/sparse.toml`, wherever the package is installed. A file of that path
    wins over a shipped recipe of that name. Raises `UserError`, with similar names, for neither.
    """
    path = Path(name)
    if os.path.isfile(path):
        return path
    shipped = {recipe.relative_to(RECIPES).with_suffix("").as_posix(): recipe for recipe in RECIPES.glob("**/*.toml")}
    shipped = dict(sorted(shipped.items()))
    wanted = path.as_posix().removeprefix("recipes/").removesuffix(".toml")
    if wanted in shipped:
        return shipped[wanted]
    beside = {other.name: str(other) for other in sorted(path.parent.glob("*.toml"))}
    spelled = beside | dict(zip(shipped, shipped, strict=True))
    close = difflib.get_close_matches(path.name, spelled, n=1) or difflib.get_close_matches(wanted, spelled, n=1)
    problem = "is a folder, not a recipe" if os.path.isdir(path) else "does not exist"
    hint = f"; did you mean {spelled[close[0]]}?" if close else ""
    raise UserError(f"recipe {path} {problem}{hint} (shipped recipes: {', '.join(shipped) or 'none'})")


def load_recipe(path: str | Path, schema: type[T], overrides: Sequence[str] = ()) -> T:
    """Read the TOML file `path`, or the shipped recipe of that name, into the dataclass `schema`.

    `schema` and the dataclasses nested in it describe sections with fields of type int, float, bool, str, `Literal`,
    `X | None`, `tuple[X, ...]`, `tuple[X, Y]`, another dataclass, or `dict`: a table whose keys are checked by whoever
    uses them. TOML knows no null: an `X | None` is None by being absent. A section that is absent is built from its
    defaults. `overrides` are strings such as `train.steps=200`; the value is read as TOML and, where that fails, taken
    as a string.

    Raises `UserError` for a missing or unreadable file, an unknown or missing key, a wrong type, a value that is not
    allowed, and for any `ValueError` of a section's own `__post_init__`.
    """
    path = find_recipe(path)
    table = _read_toml(path)
    for override in overrides:
        _set_key(table, *parse_override(override))
    try:
        return _build_section(schema, table, "")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def recipe_key(path: str | Path, name: str, overrides: Sequence[str] = (), *, default: Any = None) -> Any:
    """The value of one top-level key of a recipe, by which its schema may be chosen; nothing else of it is checked."""
    table = _read_toml(find_recipe(path))
    for override in overrides:
        _set_key(table, *parse_override(override))
    return table.get(name, default)


def change_recipe(recipe: T, changes: Mapping[str, Any]) -> T:
    """A copy of a recipe with other values under keys such as `train.steps`, checked as `load_recipe` checks them."""
    table = copy.deepcopy(_as_plain(recipe))
    for name, value in changes.items():
        _set_key(table, name, value)
    return _build_section(type(recipe), table, "")


def parse_override(override: str) -> tuple[str, Any]:
    """The key and the value of `train.steps=200`; the value is read as TOML or else is a string."""
    name, equals, text = override.partition("=")
    if not equals or not all(part.strip() for part in name.split(".")):
        raise UserError(f"override {override!r} must read section.key=value")
    return name, _parse_value(text.strip())


def dump_recipe(recipe: Any) -> str:
    """Return a recipe as TOML that `load_recipe` reads back exactly; fields that are None are left out."""
    return tomli_w.dumps(_as_plain(recipe))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise UserError(f"cannot read recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"recipe {path} is not valid TOML: {_one_line(error)}") from None


def _set_key(table: dict[str, Any], name: str, value: Any) -> None:
    *sections, key = keys = [part.strip() for part in name.split(".")]
    for depth, section in enumerate(sections, start=1):
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise UserError(
                f"override of {name!r}: {'.'.join(keys[:depth])} is a value, not a section; set it as a whole"
            )
    table[key] = value


def _parse_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # A line break in the text could smuggle in further keys.
    return parsed["value"] if len(parsed) == 1 else text


def _build_section(schema: type[T], table: dict[str, Any], name: str) -> T:
    hints = get_type_hints(schema)
    fields = {field.name: field for field in dataclasses.fields(schema) if field.init}
    for key in table:
        if key not in fields:
            raise _unknown_key(key, fields, name)
    values = {}
    for key, field in fields.items():
        full_name = f"{name}.{key}" if name else key
        if key in table:
            values[key] = _convert(hints[key], table[key], full_name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            values[key] = _build_absent(hints[key], full_name)
    try:
        return schema(**values)
    except ValueError as error:
        raise UserError(f"{name}: {_one_line(error)}" if name else _one_line(error)) from None


def _build_absent(kind: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build_section(kind, {}, name)
    if types.NoneType in get_args(kind):
        return None
    raise UserError(f"missing key {name}: give it {_describe(kind)}")


def _unknown_key(key: str, known: Sequence[str], section: str) -> UserError:
    prefix = f"{section}." if section else ""
    if close := difflib.get_close_matches(key, known, n=1):
        return UserError(f"unknown key {prefix}{key}; did you mean {prefix}{close[0]}?")
    where = f"section {section}" if section else "the recipe"
    return UserError(f"unknown key {prefix}{key}; {where} knows {', '.join(known) or 'no keys'}")


def _convert(kind: Any, value: Any, name: str) -> Any:
    """Return a parsed TOML value as the annotated type `kind`; `name` is its dotted name for messages."""
    kind = _without_none(kind)
    if get_origin(kind) is Literal:
        # The types are compared too, because 1 == True == 1.0.
        if not any(value == choice and type(value) is type(choice) for choice in get_args(kind)):
            raise UserError(f"{name} must be {_describe(kind)}, got {_show(value)}")
        return value
    if get_origin(kind) is tuple and type(value) is list:
        return _convert_list(kind, value, name)
    if dataclasses.is_dataclass(kind) and type(value) is dict:
        return _build_section(kind, value, name)
    if kind is float and type(value) is int:
        value = _as_float(value)
    if type(value) is not kind:
        raise UserError(f"{name} must be {_describe(kind)}, got {_show(value)}")
    return value


def _convert_list(kind: Any, values: list[Any], name: str) -> tuple[Any, ...]:
    kinds = get_args(kind)
    if kinds[-1:] == (Ellipsis,):
        kinds = kinds[:1] * len(values)
    if len(kinds) != len(values):
        raise UserError(f"{name} must be {_describe(kind)}, got a list of {len(values)}")
    return tuple(_convert(k, v, f"{name}[{i}]") for i, (k, v) in enumerate(zip(kinds, values, strict=True)))


def _as_float(value: int) -> float | int:
    try:
        return float(value)
    except OverflowError:
        return value


def _without_none(kind: Any) -> Any:
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    members = [member for member in get_args(kind) if member is not types.NoneType]
    assert len(members) == 1, f"a recipe's field is of one type or None, not {kind}"
    return members[0]


def _describe(kind: Any) -> str:
    kind = _without_none(kind)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(_show(choice) for choice in get_args(kind))
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        return "a list" if kinds[-1:] == (Ellipsis,) else f"a list of {len(kinds)}"
    if dataclasses.is_dataclass(kind):
        return f"a section with {', '.join(field.name for field in dataclasses.fields(kind))}"
    assert kind in _EXPECTED, f"a recipe cannot hold a field of type {kind}"
    return _EXPECTED[kind]


def _show(value: Any) -> str:
    return str(value).lower() if type(value) is bool else reprlib.repr(value)


def _as_plain(value: Any) -> Any:
    """Return a recipe as the dicts, lists and scalars of TOML."""
    if isinstance(value, tuple | list):
        return [_as_plain(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    table = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if item is not None and field.init:
            table[field.name] = _as_plain(item)
        elif field.init:
            absent_is_none = (
                field.default in (None, dataclasses.MISSING) and field.default_factory is dataclasses.MISSING
            )
            assert absent_is_none, (
                f"{field.name} is None, yet absent it would be {field.default}: let it default to None"
            )
    return table


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
