"""Signing in with a wallet: a nonce, a signed message, a session.

What costs nothing is refused first; then the nonce is used up, whatever comes of it; then the
signature is verified in another process.
Failure: a KeysError; 503 when the till, the book, the process or the chain is away.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import assert_never

import msgspec

from billing.till_link import TillLink
from config.rules import rpc_urls
from config.settings import Settings
from gateway.siwe_helper import SiweHelper
from gateway.supervise import Tasks
from gateway.till_memory import TillMemory
from keys.errors import ChainUnavailable, LoginRefused, VerifierUnavailable
from keys.identity_store import Wallet, link_wallet, sign_in
from keys.session import Session, Sessions, SessionTerms
from keys.siwe_message import Expected, SiweFields, check_message, read_message
from keys.siwe_signature import check_signature
from keys.siwe_wire import Answer, Question, Terms
from keys.store import Pool

log = logging.getLogger("gateway.sign_in")

# What a signature means to whom it is refused.
NOT_SIGNED = "The signature is not of this address for this message."
NO_CONTRACTS = "Contract wallets cannot sign in here: no chain is set up to ask."
NONCE_USED = "The nonce is not yours, was used or is older than 5 minutes: ask for another one."

CountWallet = Callable[[str], Awaitable[None]]


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """A signed message, from whom it came, and the origin that it has to be for."""

    message: str
    signature: str
    browser: bytes
    origin: str


class SignIn:
    """Everything that signing in needs. One for each worker."""

    def __init__(self, settings: Settings, pool: Pool, link: TillLink, tasks: Tasks) -> None:
        identity, chain = settings.identity, settings.chain
        self._pool = pool
        self._chain_ids = identity.chain_ids
        self.sessions = Sessions(
            TillMemory(link),
            SessionTerms(
                ttl_s=identity.session_ttl_s,
                idle_s=identity.session_idle_s,
                contract_ttl_s=identity.contract_session_ttl_s,
                per_user_max=identity.sessions_per_user_max,
            ),
        )
        # Twice this for one wallet must end before the helper counts as stuck.
        timeout_s = min(chain.timeout_s, identity.verify_timeout_s * 0.4)
        self.helper = SiweHelper(
            Terms(rpc_urls=tuple(rpc_urls(chain)), timeout_s=timeout_s),
            tasks,
            timeout_s=identity.verify_timeout_s,
            pending_max=identity.verifies_pending_max,
        )

    async def new_nonce(self) -> tuple[str, str]:
        """A nonce and its browser's secret; who asks for one will send a signature soon."""
        made = await self.sessions.new_nonce()
        self.helper.warm()
        return made

    async def sign_in(self, attempt: Attempt, count: CountWallet) -> tuple[str, Session]:
        """A new session of whoever signed the message, and its id. Raises a KeysError."""
        wallet = await self._prove(attempt, count)
        identity, is_new = await sign_in(self._pool, wallet)
        now = int(time.time())
        session = Session(
            user_id=identity.user_id,
            account_id=identity.account_id,
            virtual_key_id=identity.virtual_key_id,
            wallet=wallet.address,
            kind=wallet.kind,
            created_at=now,
            expires_at=now + self.sessions.lasts_s(wallet.kind),
        )
        secret = await self.sessions.begin(session)
        if is_new:
            log.info("user.created", extra={"account_id": str(identity.account_id)})
        facts = {"account_id": str(identity.account_id), "wallet_kind": wallet.kind}
        log.info("login.done", extra=facts)
        return secret, session

    async def link(self, session: Session, attempt: Attempt, count: CountWallet) -> Wallet:
        """Give the wallet that signed the message to the session's user too.

        Raises WalletTaken, or another KeysError.
        """
        wallet = await self._prove(attempt, count)
        await link_wallet(self._pool, session.user_id, wallet)
        log.info("wallet.linked", extra={"account_id": str(session.account_id)})
        return wallet

    async def _prove(self, attempt: Attempt, count: CountWallet) -> Wallet:
        """The wallet that signed the message, for this gateway, now, for the first time."""
        fields = read_message(attempt.message)
        signature = check_signature(attempt.signature)
        now = datetime.now(UTC)
        expected = Expected(origin=attempt.origin, chain_ids=self._chain_ids)
        check_message(fields, expected, now)
        if not await self.sessions.use_nonce(fields.nonce, attempt.browser):
            raise LoginRefused(NONCE_USED)
        question = Question(
            id=0,
            text=attempt.message,
            fields=fields,
            signature=signature,
            domain=expected.domain,
            scheme=expected.scheme,
            nonce=fields.nonce,
            at=now,
        )
        wallet = _judged(await self.helper.verify(question), fields)
        # Counted for its owner alone: whoever only names a wallet must not lock its owner out.
        await count(wallet.address)
        return wallet


def _judged(answer: Answer, fields: SiweFields) -> Wallet:
    match answer.verdict:
        case "key":
            return Wallet(address=fields.address, kind="eoa")
        case "contract":
            return Wallet(address=fields.address, kind="contract")
        case "refused":
            raise LoginRefused(NOT_SIGNED)
        case "no_chain":
            raise LoginRefused(NO_CONTRACTS)
        case "chain_away":
            raise ChainUnavailable
        case "busy":
            raise VerifierUnavailable
        case "crashed":
            log.error("login.verifier_crashed", extra={"error": answer.detail})
            raise VerifierUnavailable
        case _:
            assert_never(answer.verdict)
