"""Where the till is: the parts of its URL. Pure."""

from urllib.parse import parse_qs, unquote, urlsplit

import msgspec


class Address(msgspec.Struct, frozen=True):
    host: str
    port: int
    tls: bool
    user: str
    password: str
    database: int
    path: str = ""
    """Of a Unix socket, in place of host and port."""

    @classmethod
    def read(cls, url: str) -> "Address":
        """Raises ValueError."""
        parts = urlsplit(url)
        if parts.scheme == "unix" and parts.path and not parts.hostname:
            user, password = unquote(parts.username or ""), unquote(parts.password or "")
            database = parse_qs(parts.query).get("db", ["0"])[0]
            return cls("", 0, False, user, password, int(database), unquote(parts.path))
        if parts.scheme not in {"redis", "rediss", "valkey", "valkeys"} or not parts.hostname:
            raise ValueError(
                "the till's URL must be redis://[user:password@]host[:port][/database] "
                "or unix://[user:password@]/path/of/socket[?db=database]"
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
