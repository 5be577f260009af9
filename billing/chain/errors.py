"""What can go wrong between us and the chain. None of it says anything about a payment."""

from billing.errors import BillingError, Refusal


class ChainError(BillingError):
    """The chain cannot be read right now; what was asked is asked again later."""


class HashMalformed(Refusal):
    """A transaction hash is 0x and 64 hexadecimal digits."""


class BadAnswer(ChainError):
    """A node answered something that no honest node answers."""

    def __init__(self, what: str) -> None:
        """what is wrong, in our own words: never what the node wrote."""
        super().__init__()
        self.what = what


class NodeUnavailable(ChainError):
    """A node gave no answer that can be used."""

    def __init__(self, node: str, reason: str) -> None:
        super().__init__()
        self.node = node
        self.reason = reason


class NodeRefused(NodeUnavailable):
    """A node answered with an error of JSON-RPC."""

    def __init__(self, node: str, rpc_code: int) -> None:
        super().__init__(node, "rpc_error")
        self.rpc_code = rpc_code


class TooFewNodes(ChainError):
    """Fewer nodes answered than have to agree."""


class NodesDisagree(ChainError):
    """The nodes tell different stories, and none has the most witnesses."""


class ChainUnfit(BillingError):
    """The nodes or the token are not what the settings say; nothing may be credited."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__()
        self.problems = problems
