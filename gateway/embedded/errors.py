"""What can go wrong with the embedded stores. The docstring of a class is its default message."""

from pathlib import Path


class StoreError(Exception):
    """The stores are not available."""

    def __init__(self, detail: str = "") -> None:
        message = (type(self).__doc__ or "").strip()
        super().__init__(f"{message} {detail}".strip())


class StoreStartFailed(StoreError):
    """A store did not start."""

    def __init__(self, name: str, log_tail: str) -> None:
        self.name = name
        self.log_tail = log_tail
        super().__init__(f"{name}: {log_tail}")


class StoresInUse(StoreError):
    """Another process runs the stores of this data folder."""

    def __init__(self, pid: int, data_dir: Path) -> None:
        self.pid = pid
        self.data_dir = data_dir
        super().__init__(
            f"pid {pid} owns {data_dir}; stop that process or choose another --data-dir."
        )


class StoresNotRunning(StoreError):
    """No process runs the stores of this data folder."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        super().__init__(f"{data_dir}: start `farebox demo` or `farebox serve` first.")


class StoreUnsupported(StoreError):
    """Embedded stores do not run on this platform."""

    def __init__(self, platform: str) -> None:
        self.platform = platform
        super().__init__(
            f"{platform}: on Windows run farebox inside WSL (wsl --install); elsewhere point"
            " FAREBOX_DATABASE_URL and FAREBOX_TILL_URL at servers of your own."
        )
