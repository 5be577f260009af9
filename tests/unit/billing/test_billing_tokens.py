"""Our own count: bounded in time for any text, and never fetched."""

import asyncio
import time
from functools import partial
from operator import mul

import pytest

from billing import tokens
from billing.tokens import PIECE_CHARS, TokenCounter, count_tokens


async def test_special_tokens_are_plain_text() -> None:
    assert await TokenCounter().count(lambda: "") == 0
    assert count_tokens("hello world") == 2
    assert count_tokens("<|endoftext|>") > 1
    assert count_tokens("\ud800") > 0


def test_one_long_word_takes_no_long_time() -> None:
    """The tokenizer's time grows with the square of a word: 64 KiB at a time took 0.4 s."""
    started = time.process_time()

    counted = count_tokens("a" * 256 * 1024)

    assert counted == 256 * 1024 // 8
    assert time.process_time() - started < 1


def test_pieces_count_nearly_like_the_whole() -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 1000

    pieces = len(text) // PIECE_CHARS + 1
    assert 0 <= count_tokens(text) - 10_000 <= pieces * 2


def test_beyond_the_bound_the_rest_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "COUNTED_CHARS_MAX", 10_000)

    assert count_tokens(" " * 14_000) - count_tokens(" " * 10_000) == 1000


async def test_a_few_counts_run_at_once() -> None:
    counter = TokenCounter()

    counts = await asyncio.gather(
        *(counter.count(partial(mul, "hello world", n)) for n in range(1, 20))
    )

    assert counts == [count_tokens("hello world" * n) for n in range(1, 20)]
