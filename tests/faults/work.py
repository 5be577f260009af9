"""What `farebox work` does, with its settings on stdin as a worker gets them."""

import asyncio
import signal
import sys

from gateway.log import set_up_logging
from gateway.supervisor import decode_settings
from gateway.work import working
from gateway.worker import say_ready


def main() -> int:
    settings = decode_settings(sys.stdin.buffer.read())
    set_up_logging(settings.log)

    async def stand_by() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        async with working(settings):
            say_ready()
            await stop.wait()

    asyncio.run(stand_by())
    return 0
