"""Who asks: the lab and the scopes behind a key."""

from __future__ import annotations

from dataclasses import dataclass

from gradient_blueprints.errors import PermissionDenied
from gradient_blueprints.models import Scope


@dataclass(frozen=True)
class Caller:
    key_id: int
    lab_id: int
    lab: str
    scopes: frozenset[Scope]
    key_prefix: str
    request_id: str | None = None

    def has(self, *scopes: Scope) -> bool:
        """Whether the key has one of `scopes`; an admin key has every scope."""
        return Scope.ADMIN in self.scopes or not self.scopes.isdisjoint(scopes)

    def require(self, *scopes: Scope) -> None:
        """PermissionDenied unless the key has one of `scopes`."""
        if not self.has(*scopes):
            wanted = " or ".join(scopes)
            have = ", ".join(sorted(self.scopes))
            raise PermissionDenied(f"This needs a key with the scope {wanted}; {self.key_prefix}… has {have}.")
