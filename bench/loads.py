"""The loads by name, and what a run does with them. Pure."""

import msgspec

from bench.load import Kind
from bench.shape import Shape

MODEL = "bench"


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent. The peak phase is a closed loop, the open phase has Poisson arrivals."""

    name: str
    about: str
    kinds: list[Kind]
    connections: int
    has_peak: bool = True
    has_open: bool = False
    has_curve: bool = False
    """Whether the open phase is repeated at several rates."""
    once: bool = False
    """Each connection makes one long request; the phase lasts as long as that."""
    ramp_s: float = 0.0
    rate_share: float = 1.0
    """Of the rate of a run, for a load that is heavier than chat-1k."""

    @property
    def is_stream(self) -> bool:
        return all(kind.stream for kind in self.kinds)


def chat(name: str, size: int, connections: int, *, has_open: bool) -> Load:
    return Load(
        name=name,
        about=f"not streamed, prompts of {size // 1024} KB, {connections} connections",
        kinds=[Kind(prompt_bytes=size)],
        connections=connections,
        has_open=has_open,
        has_curve=size == 1024,
    )


def paced(name: str, streams: int, chunks: int, every_ms: int, *, once: bool = False) -> Load:
    shape = Shape(chunks=chunks, every_ms=every_ms)
    return Load(
        name=name,
        about=f"{streams} streams at once, {chunks} chunks, one every {every_ms} ms",
        kinds=[Kind(prompt_bytes=1024, stream=True, shape=shape)],
        connections=streams,
        once=once,
        ramp_s=min(chunks * every_ms / 1000, 2.0 + streams / 500),
    )


MIXED = [
    Kind(prompt_bytes=1024, weight=8),
    Kind(prompt_bytes=32 * 1024, weight=1),
    Kind(prompt_bytes=1024, stream=True, weight=1, shape=Shape(chunks=20, every_ms=20)),
]

LOADS = {
    load.name: load
    for load in (
        chat("chat-1k", 1024, 64, has_open=True),
        chat("chat-32k", 32 * 1024, 16, has_open=True),
        chat("chat-200k", 200 * 1024, 8, has_open=False),
        Load(
            name="burst-50",
            about="streams of 50 chunks at once, 16 connections",
            kinds=[Kind(prompt_bytes=1024, stream=True, shape=Shape(chunks=50))],
            connections=16,
        ),
        paced("paced-200", 200, 100, 20),
        paced("paced-1000", 1000, 600, 100, once=True),
        Load(
            name="mixed",
            about="8 of 10 plain 1 KB, 1 plain 32 KB, 1 stream of 20 chunks every 20 ms",
            kinds=MIXED,
            connections=128,
            has_peak=False,
            has_open=True,
            rate_share=0.5,
        ),
    )
}
QUICK = ("chat-1k", "chat-32k", "burst-50", "paced-200")
DEFAULT = ("chat-1k", "chat-32k", "chat-200k", "burst-50", "paced-200", "mixed")


def stream_s(load: Load) -> float:
    """How long the longest answer of a load lasts by itself."""
    return max(kind.shape.chunks * kind.shape.every_ms / 1000 for kind in load.kinds)
