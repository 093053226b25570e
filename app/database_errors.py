"""Which errors of the database pass by themselves, so that trying again helps, and which are faults of ours."""

from __future__ import annotations

from asyncpg import exceptions
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

# The driver's, by what the server said; SQLAlchemy has no class of its own for most of them.
_PASSING = (
    exceptions.PostgresConnectionError,  # the connection broke
    exceptions.InvalidAuthorizationSpecificationError,  # an operator changes a password, or keeps us out for a while
    exceptions.OperatorInterventionError,  # the server starts, stops or recovers, or a time limit ended the statement
    exceptions.InsufficientResourcesError,  # too many connections, no memory, no room on the disk
    exceptions.TransactionRollbackError,  # a deadlock: one of the transactions had to go
    exceptions.IdleInTransactionSessionTimeoutError,
    exceptions.InterfaceError,  # the connection was closed before or meanwhile
    exceptions.InternalClientError,  # the server died while the driver was between two states
)
RAISED = (DBAPIError, PoolTimeout, OSError, exceptions.PostgresError, *_PASSING[-2:])
"""What a broken database makes a request raise; a COPY goes to the driver, whose errors nobody wraps."""


def passes(error: BaseException) -> bool:
    if isinstance(error, (OperationalError, InterfaceError, PoolTimeout, OSError, *_PASSING)):
        return True
    if not isinstance(error, DBAPIError):
        return False
    return error.connection_invalidated or isinstance(error.orig and error.orig.__cause__, _PASSING)
