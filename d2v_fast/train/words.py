"""Words of messages."""


def counted(number: int, one: str, many: str = "") -> str:
    """``number`` with its noun: "1 rank", "2 ranks"; ``many`` is the plural where it is not ``one`` and an s."""
    return f"{number} {one if number == 1 else many or one + 's'}"
