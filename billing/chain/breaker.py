"""How often a node is asked: a bucket of requests, and a breaker when it fails. Pure."""


class Bucket:
    """So many requests a second, and so many at once; times in ms of a clock that only grows."""

    def __init__(self, per_second: int, burst: int, now_ms: int) -> None:
        self._per_second = per_second
        # In thousandths of a request, so that integers are exact.
        self._full = burst * 1000
        self._left = self._full
        self._at_ms = now_ms

    def take(self, now_ms: int, wait_max_ms: int) -> int | None:
        """ms until one request may be made; None, and nothing taken, when that is too long."""
        elapsed_ms = max(now_ms - self._at_ms, 0)
        self._left = min(self._left + elapsed_ms * self._per_second, self._full)
        self._at_ms = max(now_ms, self._at_ms)
        missing = 1000 - self._left
        wait_ms = -(-missing // self._per_second) if missing > 0 else 0
        if wait_ms > wait_max_ms:
            return None
        self._left -= 1000
        return wait_ms


class Breaker:
    """Opens after so many failures in a row; then one request at a time finds out."""

    def __init__(self, failures_max: int, open_ms: int) -> None:
        self._failures_max = failures_max
        self._open_ms = open_ms
        self._failures = 0
        self._closed_at_ms: int | None = None

    @property
    def is_open(self) -> bool:
        return self._closed_at_ms is not None

    def lets_through(self, now_ms: int) -> bool:
        if self._closed_at_ms is None:
            return True
        if now_ms < self._closed_at_ms:
            return False
        # The next try is a whole period later, also when this one is cancelled and says nothing.
        self._closed_at_ms = now_ms + self._open_ms
        return True

    def succeeded(self) -> None:
        self._failures = 0
        self._closed_at_ms = None

    def failed(self, now_ms: int) -> bool:
        """True when this failure opened it."""
        self._failures += 1
        if self._failures < self._failures_max and not self.is_open:
            return False
        return self.trip(now_ms)

    def trip(self, now_ms: int) -> bool:
        """Open at once: the node asked for it. True when it was closed before."""
        was_closed = not self.is_open
        self._closed_at_ms = now_ms + self._open_ms
        return was_closed
