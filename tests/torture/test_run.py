"""A short form of `make torture`, and a checker that can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from torture.__main__ import report
from torture.damage import DAMAGES
from torture.journal import Outcome
from torture.run import performed
from torture.schedule import FaultKind, Scale, make_schedule

SMALL = Scale(clients=2, relays=1, workers=1, jobs=1, sharded=0, gap=1.0, lease=3.0)
SCHEDULE = make_schedule(seed=2692, seconds=13, scale=SMALL)  # a seed with every kind of fault


def test_what_was_promised_holds_after_kills_cuts_and_a_full_store(
    server_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One test of all, since each run costs half a minute: the run, its check, and damage that the check must see."""
    with performed(SCHEDULE, server_folder) as run:
        print(SCHEDULE)
        report(run)
        told = capsys.readouterr().out
        assert run.violations == 0, told
        assert run.faults.total() >= 6, told
        assert {FaultKind.KILL_API, FaultKind.KILL_WORKER, FaultKind.KILL_POSTGRES, FaultKind.WIPE_BROKER} <= set(
            run.faults
        )
        acknowledged = [operation for operation in run.journal if operation.outcome is Outcome.ACKNOWLEDGED]
        assert len(acknowledged) > 10, told
        found = run.damaged()
        assert set(found) == set(DAMAGES)
        assert {name for name, more in found.items() if more <= 0} == set(), found
