"""Many names in little memory, shared by forked workers."""

from collections.abc import Iterable, Sequence

import numpy as np

ERRORS = "surrogateescape"  # file names need not be UTF-8


class Names(Sequence[str]):
    """An unchanging sequence of strings, kept as one array of bytes.

    A list of strings would be copied by every forked worker bit by bit: reading an object counts its references, which
    writes to its page of memory.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        encoded = [name.encode("utf-8", ERRORS) for name in names]
        self.text = np.frombuffer(b"".join(encoded), np.uint8)
        self.ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)  # [n]

    @classmethod
    def from_arrays(cls, text: np.ndarray, ends: np.ndarray) -> "Names":
        """From ``text`` uint8 and ``ends`` int64 [n] of another one, as a cache keeps them."""
        names = cls()
        names.text, names.ends = text, ends
        return names

    @classmethod
    def joined(cls, parts: Sequence["Names"]) -> "Names":
        """Those of all ``parts``, one part after the other."""
        starts = np.cumsum([0, *(len(part.text) for part in parts)])
        text = np.concatenate([cls().text, *(part.text for part in parts)])
        ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
        return cls.from_arrays(text, np.concatenate([cls().ends, *ends]))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, item: int) -> str:
        if not 0 <= item < len(self.ends):
            raise IndexError(f"name {item} of {len(self.ends)}")
        start = self.ends[item - 1] if item else 0
        return self.text[start : self.ends[item]].tobytes().decode("utf-8", ERRORS)

    def take(self, items: Iterable[int]) -> "Names":
        """Those of ``items``, in their order."""
        return Names(self[item] for item in items)
