"""How long a device works on what is queued for it."""

from __future__ import annotations

import time
from collections.abc import Callable


class DeviceClock:
    """Time work that is queued on a device before the work in front of it has ended.

    The time of a piece of work runs from when it was queued, or from when the device was last free if that is later, to
    when its results are there.

    Example:
        >>> clock = DeviceClock()
        >>> first, second = clock.queued(), clock.queued()
        >>> first() >= 0 and second() >= 0  # each is called when the results of its work are there
        True
    """

    def __init__(self) -> None:
        self._free_at = 0.0

    def queued(self) -> Callable[[], float]:
        """Note that work is queued now.

        Returns:
            A function to call when the results are there; it gives the seconds of that work.
        """
        queued_at = time.perf_counter()

        def seconds() -> float:
            begun, self._free_at = max(queued_at, self._free_at), time.perf_counter()
            return self._free_at - begun

        return seconds

    def free(self) -> None:
        """Note that the device has nothing to do: what is queued next is not charged with the work before."""
        self._free_at = time.perf_counter()
