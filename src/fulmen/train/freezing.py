"""Which parameters a run trains: some stay as they are, named by the beginnings of their names."""

from collections import Counter
from collections.abc import Sequence

from torch import nn

from fulmen.config import UserError


def freeze(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Let no parameter train whose name is one of these prefixes or goes on from one with a dot.

    Raises UserError for a prefix that no parameter has, and where nothing would be left to train.
    """
    for prefix in prefixes:
        chosen = [parameter for name, parameter in model.named_parameters() if f"{name}.".startswith(f"{prefix}.")]
        if not chosen:
            raise UserError(
                f"train.freeze: no parameter's name begins with {prefix!r}; the parts are {', '.join(_parts(model))}"
            )
        for parameter in chosen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("train.freeze leaves nothing to train: take a prefix out of it")


def describe_parts(model: nn.Module) -> str:
    """How many parameters of each part train and how many are frozen, in one line."""
    trained, frozen = Counter(), Counter()
    for name, parameter in model.named_parameters():
        (trained if parameter.requires_grad else frozen)[name.partition(".")[0]] += parameter.numel()
    return f"trained: {_counts(trained)}; frozen: {_counts(frozen)}"


def _counts(parts: Counter) -> str:
    return ", ".join(f"{part} {count:,}" for part, count in parts.items()) or "nothing"


def _parts(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name, _ in model.named_parameters()))
