"""How errors of other people's code are told: on one line, and not at length."""


def describe_error(error: BaseException) -> str:
    """Its type and its message."""
    return shorten(f"{type(error).__name__}: {error}", 240)


def shorten(text: str, width: int) -> str:
    """One line of at most `width` characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 4]} ..."
