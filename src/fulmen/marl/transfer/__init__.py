"""How knowledge moves between the agents of a team: PAT and the rivals that it is compared with."""

import difflib
import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from fulmen.config import UserError
from fulmen.marl.transfer.base import Decision, Experience, Transfer

if TYPE_CHECKING:
    from fulmen.marl.learner import TeamLearner

__all__ = ["TRANSFERS", "Decision", "Experience", "Transfer", "make_transfer"]

# Name: module, class and its settings. A method's module is imported when it is asked for.
TRANSFERS = {
    "none": ("base", "Transfer", None),
    "pat": ("pat", "PAT", "PATSettings"),
    "uniform": ("uniform", "UniformTeacher", "StudentSettings"),
    "best_teacher": ("best_teacher", "BestTeacher", "StudentSettings"),
    "adhoc_visit": ("adhoc", "AdHocVisit", "AdHocSettings"),
    "adhoc_td": ("adhoc", "AdHocTD", "AdHocSettings"),
    "lectr": ("lectr", "LeCTR", "LeCTRSettings"),
}


def make_transfer(name: str, learner: "TeamLearner", **settings: Any) -> Transfer:
    """The method of that name for a learner's team.

    Raises:
        UserError: an unknown name or setting (with the nearest), or a value that is not allowed.
    """
    if name not in TRANSFERS:
        raise UserError(f"unknown transfer {name!r}{_suggest(name, TRANSFERS)}; there are {', '.join(TRANSFERS)}")
    module, kind, kind_of_settings = TRANSFERS[name]
    if kind_of_settings is None:
        if settings:
            raise UserError(f"transfer {name} has no settings, got {', '.join(settings)}")
        return Transfer(learner)
    room = importlib.import_module(f"{__name__}.{module}")
    schema = getattr(room, kind_of_settings)
    return getattr(room, kind)(learner, _read_settings(name, schema, settings))


def _read_settings(name: str, schema: type, settings: dict[str, Any]) -> Any:
    hints = get_type_hints(schema)
    for key, value in settings.items():
        if key not in hints:
            raise UserError(f"transfer {name} has no setting {key}{_suggest(key, hints)}; there are {', '.join(hints)}")
        # The choices of a Literal are checked by the settings themselves.
        kinds = {type(kind) if isinstance(kind, str) else kind for kind in get_args(hints[key]) or (hints[key],)}
        kinds |= {int} if float in kinds else set()
        if type(value) not in kinds:
            raise UserError(f"transfer {name}: {key} must be {_describe(kinds)}, got {value!r}")
    return schema(**settings)


def _describe(kinds: set[type]) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string", type(None): "absent"}
    kinds = kinds - {int} if float in kinds else kinds
    return " or ".join(text for kind, text in names.items() if kind in kinds)


def _suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {close[0]}?" if close else ""
