"""What is free of a range of addresses, out of which pieces are taken and to which they come back."""

from __future__ import annotations

import bisect


class Stretches:
    """Free stretches of a range, in order, never two that touch.

    Args:
        size: of the range, all of it free.
    """

    def __init__(self, size: int = 0):
        self._free = [(0, size)] if size else []  # offset and length

    @property
    def total(self) -> int:
        """All that is free, in however many stretches."""
        return sum(length for _, length in self._free)

    @property
    def longest(self) -> int:
        """The longest stretch that is free."""
        return max((length for _, length in self._free), default=0)

    def ending_at(self, end: int) -> int:
        """How long the free stretch is that ends at an offset; 0 for none."""
        return next((length for offset, length in self._free if offset + length == end), 0)

    def take(self, size: int, *, from_top: bool = False) -> int | None:
        """Where a piece begins that is free no more; None where no stretch is long enough.

        Args:
            from_top: the highest such place instead of the lowest.
        """
        places = reversed(range(len(self._free))) if from_top else range(len(self._free))
        for place in places:
            offset, length = self._free[place]
            if length >= size:
                rest = (offset, length - size) if from_top else (offset + size, length - size)
                self._free[place : place + 1] = [rest] if rest[1] else []
                return offset + length - size if from_top else offset
        return None

    def give_back(self, offset: int, size: int) -> None:
        """A piece that is free again, or new in the range."""
        place = bisect.bisect(self._free, (offset, size))
        end = offset + size
        if place < len(self._free) and self._free[place][0] == end:
            end += self._free.pop(place)[1]
        if place and sum(self._free[place - 1]) == offset:
            place -= 1
            offset = self._free.pop(place)[0]
        self._free.insert(place, (offset, end - offset))
