"""Where the till is: the parts of its URL. Pure."""

from urllib.parse import unquote, urlsplit

import msgspec


class Address(msgspec.Struct, frozen=True):
    host: str
    port: int
    tls: bool
    user: str
    password: str
    database: int

    @classmethod
    def read(cls, url: str) -> "Address":
        parts = urlsplit(url)
        if parts.scheme not in {"redis", "rediss", "valkey", "valkeys"} or not parts.hostname:
            raise ValueError(
                "the till's URL must be redis://[user:password@]host[:port][/database]"
            )
        database = parts.path.strip("/") or "0"
        return cls(
            parts.hostname,
            parts.port or 6379,
            parts.scheme in {"rediss", "valkeys"},
            unquote(parts.username or ""),
            unquote(parts.password or ""),
            int(database),
        )

    def hello(self) -> list[tuple[str | int, ...]]:
        commands: list[tuple[str | int, ...]] = []
        if self.password:
            user = (self.user,) if self.user else ()
            commands.append(("AUTH", *user, self.password))
        if self.database:
            commands.append(("SELECT", self.database))
        return commands
