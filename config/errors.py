"""What this package raises."""


class ConfigError(Exception):
    """The configuration cannot be used."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)
