"""JSON log lines: the message is an event name, facts are fields. Never prompts, never secrets."""

import asyncio
import logging
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import msgspec

from config.settings import Log

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_encoder = msgspec.json.Encoder(enc_hook=str)


class JsonFormatter(logging.Formatter):
    """One JSON object for each record."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        for name, value in vars(record).items():
            if name not in _STANDARD:
                line[name] = value
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return _encoder.encode(line).decode()


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """False for what the server says of a request that was cut off on purpose."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def set_up_logging(settings: Log) -> None:
    """Send everything to stderr or to the file, as JSON lines."""
    stream: TextIO = sys.stderr
    handler: logging.Handler
    if settings.path:
        Path(settings.path).parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(settings.path, encoding="utf-8")
    else:
        handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    # What no line of ours shows is not looked up for every record: caller, thread, process.
    # https://docs.python.org/3/howto/logging.html#optimization
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = False
    logging.logMultiprocessing = False
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())
    # Frameworks below warning tell what our own events tell better.
    for name in ("uvicorn", "uvicorn.error", "asyncio", "litestar"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").disabled = True
    logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
