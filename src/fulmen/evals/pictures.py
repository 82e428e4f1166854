"""Built-in pictures to be measured on."""

from random import Random

from fulmen.config import UserError
from fulmen.data.pictures import UNSEEN_VARIANT, Picture, open_pictures, split_pictures


def choose_pictures(name: str, *, held_out: float, count: int, known: bool = False) -> list[Picture]:
    """Up to `count` pictures of the source `name` that training with the share `held_out` never shows.

    `known`: examples that it shows, in renderings that it does not. Raises UserError if there are none.
    """
    source = open_pictures(name)
    numbers = split_pictures(source, held_out)[0 if known else 1]
    if not len(numbers):
        raise UserError(f"no pictures of {name} are held out: give a share above 0")
    chosen = Random(name).sample(numbers.tolist(), min(count, len(numbers)))
    return [source.example(number, UNSEEN_VARIANT + place) for place, number in enumerate(chosen)]
