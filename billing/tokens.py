"""Counting tokens ourselves, for answers whose provider reported no usage.

Off the hot path: in a thread, bounded in size. The tokenizer's data ships with the project; it is
never fetched.
"""

import asyncio
import os
from collections.abc import Callable
from functools import cache
from importlib import resources

import tiktoken

# Longer texts are counted piece by piece: the tokenizer's time grows with the square of a word's
# length, and 8 MiB of one letter in pieces of 64 KiB hold a thread for 50 seconds, in these for 3.
PIECE_CHARS = 4 * 1024
# Beyond this the rest counts as one token for every 4 characters.
COUNTED_CHARS_MAX = 8 * 1024 * 1024
CHARS_PER_TOKEN = 4
THREADS_AT_ONCE = 2


@cache
def _encoding() -> tiktoken.Encoding:
    data = resources.files("config").joinpath("data", "tiktoken")
    # The only way to tell tiktoken where its files are; without it, it would fetch them.
    os.environ["TIKTOKEN_CACHE_DIR"] = str(data)
    return tiktoken.get_encoding("o200k_base")


def is_ready() -> bool:
    """False until the first count: reading the tokenizer's data takes half a second."""
    return bool(_encoding.cache_info().currsize)


def count_tokens(text: str) -> int:
    """Tokens of a text in o200k_base; every special token counts as plain text."""
    if not text:
        return 0
    encoding = _encoding()
    counted = text[:COUNTED_CHARS_MAX]
    total = sum(
        len(encoding.encode_ordinary(counted[start : start + PIECE_CHARS]))
        for start in range(0, len(counted), PIECE_CHARS)
    )
    return total + (len(text) - len(counted)) // CHARS_PER_TOKEN


class TokenCounter:
    """`count_tokens` in a thread, a few at a time."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(THREADS_AT_ONCE)

    async def count(self, read_text: Callable[[], str]) -> int:
        """Tokens of a text, which is put together in the thread too: it may be large."""
        async with self._slots:
            return await asyncio.to_thread(lambda: count_tokens(read_text()))
