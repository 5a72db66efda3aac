"""How often our methods were called."""

from collections.abc import Callable


class Calls:
    """The calls of one function of ours, which copies of its owner and subclasses share."""

    def __init__(self) -> None:
        self.count = 0


def counted(ours: Callable) -> tuple[Callable, Calls]:
    """``ours``, and its calls: also those that it leaves to the original, and those that end in an error.

    Where a compiler traces the call, it is counted once a trace; replays of a CUDA graph are not seen.
    """
    calls = Calls()

    def called() -> None:
        calls.count += 1

    # as torch.compiler.assume_constant_result: it runs while the call is traced, and is no part of what is compiled
    called._dynamo_marked_constant = True

    def method(*args, **kwargs):
        called()
        return ours(*args, **kwargs)

    return method, calls
