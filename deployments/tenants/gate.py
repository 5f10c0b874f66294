"""Who calls: the key says which tenant, the live policy what it may. Denied unless said otherwise.

Without tenants everybody may do everything, as on a machine of one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from deployments.tenants.keys import KeyFile
from select_n_core.errors import AuthenticationError, UnavailableError
from select_n_core.live import LivePolicy, TenantConfig

# As of now; it costs nothing to ask again. None: there is a policy, and it is not known yet.
PolicySource = Callable[[], LivePolicy | None]

_NOBODY = LivePolicy()


def open_to_all() -> LivePolicy:
    """The policy where there is no controller: no tenants, no classes."""
    return _NOBODY


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request.

    Attributes:
        tenant: None where nobody needs to be known.
        policy: that held when it came; all of the request is judged by this one.
    """

    tenant: TenantConfig | None
    policy: LivePolicy

    @property
    def is_admin(self) -> bool:
        """Whether it sees what concerns everybody."""
        return self.tenant is None or self.tenant.admin

    def may_use(self, model: str) -> bool:
        """Whether the model is there for it."""
        if self.tenant is None or self.tenant.models is None:
            return True
        return model in self.tenant.models


class Gate:
    """Tells callers apart by their keys."""

    def __init__(self, policy: PolicySource) -> None:
        self._source = policy
        self._keys = KeyFile()
        self._policy: LivePolicy | None = None
        self._tenants: Mapping[str, TenantConfig] = {}

    def caller(self, authorization: str | None) -> Caller:
        """Who sends this `Authorization` header; None where there is none.

        Raises:
            AuthenticationError: no key, or a strange one.
            UnavailableError: nobody can tell now.
        """
        policy = self._latest()
        if not policy.tenants:
            return Caller(None, policy)
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise AuthenticationError(
                "no API key was given; send it as the header Authorization: Bearer KEY"
            )
        assert policy.keys_file is not None  # the policy says so itself
        name = self._keys.tenant_of(key, policy.keys_file)
        # A key of a tenant that is no longer in the policy opens nothing.
        tenant = None if name is None else self._tenants.get(name)
        if tenant is None:
            raise AuthenticationError("this API key is not known here; check it, or ask for one")
        return Caller(tenant, policy)

    def _latest(self) -> LivePolicy:
        policy = self._source()
        if policy is None:
            raise UnavailableError("who may come in is not known yet; send the request again")
        if policy is not self._policy:
            self._policy = policy
            self._tenants = {tenant.name: tenant for tenant in policy.tenants}
        return policy
