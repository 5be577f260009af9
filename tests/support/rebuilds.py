"""A rebuild of a till as an operator does it."""

import asyncpg

from billing.till_rebuild import Rebuilt, rebuild


async def rebuild_at(book_url: str, till_url: str, wait_ms: int = 0) -> Rebuilt:
    conn = await asyncpg.connect(book_url)
    try:
        return await rebuild(conn, till_url, wait_ms=wait_ms, say=lambda line: None)
    finally:
        await conn.close()
