"""The only place of this package that opens files.

Failure: nothing is raised; the second of the pair says what is wrong, the first is then empty.
"""

from pathlib import Path

from config.names import readable

BYTES_MAX = 4 * 1024 * 1024


def read_bytes(path: Path) -> tuple[bytes, str | None]:
    try:
        with path.open("rb") as file:
            content = file.read(BYTES_MAX + 1)
    except OSError as exc:
        return b"", f"cannot read {readable(str(path))}: {exc.strerror or type(exc).__name__}"
    except ValueError:
        return b"", "not a path"
    if len(content) > BYTES_MAX:
        return b"", f"{readable(str(path))} is larger than {BYTES_MAX} bytes"
    return content, None


def read_secret(path: Path) -> tuple[str, str | None]:
    """Read a text without the newline that editors and `echo` put at its end."""
    content, wrong = read_bytes(path)
    if wrong:
        return "", wrong
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return "", f"{readable(str(path))} is not UTF-8"
    return text.removesuffix("\n").removesuffix("\r"), None
