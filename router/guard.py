"""The lock on every route: who may knock where, decided before anything of a request is read.

Nothing is open because it was forgotten. What is not named here as open to everybody or to tenants is for
administrators, routes that do not exist included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container

from starlette.types import ASGIApp, Receive, Scope, Send

from router.dialects import dialect_of
from router.quota import Quotas
from router.tenants import ANYONE, Keyring, Tenant
from wire.errors import InvalidKey, NotAllowed, PenumbraError

OPEN = frozenset(("/health", "/healthz", "/liveness", "/livez", "/live", "/readiness", "/readyz"))
"""What a load balancer and a kubelet ask, without a key."""

OPEN_INSIDE = OPEN | {"/metrics"}
"""The same on an address that only this machine reaches."""

PAGE = "/page/"
"""Files of the front page: the same for everybody, with nothing of the cluster in them. What the page then asks for
needs a key like anything else."""

FOR_TENANTS = frozenset(("/tokenize", "/detokenize", "/version", "/openapi.json"))
"""Besides /v1/."""


class Guard:
    """Answers 401, 403 and 429, or lets the request in as its tenant, `scope["state"]["tenant"]`.

    A request that generates is counted against its tenant's limits before its body is read, and as a stream until it is
    over; `scope["state"]["stay"]` is where its tokens are counted.

    keyring  None where no keys are configured: then everybody is `ANYONE`
    inside   whether only this machine reaches the address
    admin    whether this is the administrators' own port
    counted  paths of requests that generate
    """

    def __init__(
        self,
        app: ASGIApp,
        keyring: Keyring | None,
        quotas: Quotas,
        *,
        counted: Container[str],
        inside: bool,
        admin_port: bool,
        admin: bool = False,
    ) -> None:
        self._app = app
        self._keyring = keyring
        self._quotas = quotas
        self._counted = counted
        self._open = OPEN_INSIDE if inside or admin else OPEN
        self._inside = inside
        self._admin_port = admin_port
        self._admin = admin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        async with contextlib.AsyncExitStack() as stack:
            try:
                state["tenant"] = tenant = self._let_in(scope)
                if scope["method"] == "POST" and scope["path"] in self._counted:
                    state["stay"] = await stack.enter_async_context(self._quotas.stay(tenant))
            except PenumbraError as error:
                state["error_code"], state["refusal"] = error.code, error
                headers = {"www-authenticate": "Bearer"} if isinstance(error, InvalidKey) else None
                await dialect_of(scope["path"]).refusal(error, headers)(scope, receive, send)
                return
            await self._app(scope, receive, send)

    def _let_in(self, scope: Scope) -> Tenant:
        keyring, path = self._keyring, scope["path"]
        if path in self._open or path == "/" or path.startswith(PAGE) or (self._admin and self._inside):
            return ANYONE
        for_tenants = path.startswith("/v1/") or path in FOR_TENANTS
        if keyring is None:
            if self._admin_port and not self._admin and not for_tenants and path != "/":
                raise NotAllowed("This is for administrators; ask on the administrators' port.")
            return ANYONE
        tenant = keyring.tenant_of(_key(scope))
        if tenant is None:
            raise InvalidKey(
                "No valid API key came with the request. Send one as 'authorization: Bearer KEY' or 'x-api-key: KEY'."
            )
        if not tenant.admin and (self._admin or not for_tenants):
            raise NotAllowed("This is for administrators, and the API key is not one of theirs.")
        return tenant


def _key(scope: Scope) -> str:
    """The API key a request came with, or nothing."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer":
        key = headers.get(b"x-api-key", b"")
    return key.strip().decode("latin-1")
