"""`python -m torture`: kills, cuts and fills what the registry depends on while clients work, and checks what is left.

`make torture` calls it. The exit status is 1 when anything was violated.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from torture.journal import Outcome
from torture.run import Run, performed
from torture.schedule import FaultKind, Scale, Schedule, make_schedule

SHOWN = 12  # violations of a rule


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m torture", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the whole schedule (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=120, help="how long faults go on (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=4, help="labs at work (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=4, help="jobs of each (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="a new folder for logs, journals and data; a temporary one otherwise")
    parser.add_argument("--only-schedule", action="store_true", help="print the schedule and stop")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    schedule = make_schedule(arguments.seed, arguments.seconds, Scale(clients=arguments.clients, jobs=arguments.jobs))
    print(schedule, flush=True)
    if arguments.only_schedule:
        return 0
    if arguments.keep is not None:
        arguments.keep.mkdir(parents=True)
        return _perform(schedule, arguments.keep.resolve())
    with tempfile.TemporaryDirectory(prefix="torture-", ignore_cleanup_errors=True) as folder:
        return _perform(schedule, Path(folder))


def _perform(schedule: Schedule, folder: Path) -> int:
    began = time.monotonic()
    with performed(schedule, folder) as run:
        report(run)
        missed = [name for name, more in _damaged(run).items() if more <= 0]
    print(f"\n{time.monotonic() - began:.0f} s in all")
    print(f"VIOLATIONS: {run.violations}" + (f"; damage that the checker missed: {missed}" if missed else ""))
    return 1 if run.violations or missed else 0


def report(run: Run) -> None:
    outcomes = {kind: Counter[Outcome]() for kind in sorted({operation.kind for operation in run.journal})}
    for operation in run.journal:
        outcomes[operation.kind][operation.outcome] += 1
    print(f"\n{'operations':28}{''.join(f'{outcome:>14}' for outcome in Outcome)}")
    for kind, counted in outcomes.items():
        print(f"{kind:28}{''.join(f'{counted[outcome]:14}' for outcome in Outcome)}")
    total = sum(outcomes.values(), Counter())
    print(f"{f'{len(run.journal)} in all':28}{''.join(f'{total[outcome]:14}' for outcome in Outcome)}")

    print(f"\nfaults: {run.faults.total()}")
    for fault in FaultKind:
        print(f"{run.faults[fault]:6}  {fault}")
    system = run.system
    print(f"{system.proxy.cuts:6}  connections of clients and workers cut, {system.database_proxy.cuts} to Postgres")
    if not system.store.mounted:
        print("        no file system of limited size could be mounted: a small quota of each lab's files instead")
    for name, statuses in system.ended_by_themselves().items():
        print(f"        {name} ended by itself with status {statuses} and was started again")
    print(f"settled {run.settled:.1f} s after the last fault")

    print(f"\n{'looked at':>10}{'violated':>10}")
    for rule in run.rules:
        print(f"{rule.examined:10}{len(rule.violations):10}  {rule.name}")
        for violation in rule.violations[:SHOWN]:
            print(f"{'':22}{violation[:400]}")


def _damaged(run: Run) -> dict[str, int]:
    """The checker must be able to fail: each of these is done, counted, and rolled back."""
    found = run.damaged()
    print("\nviolations more after damage, each rolled back")
    for name, more in found.items():
        print(f"{more:10}  {name}")
    return found


if __name__ == "__main__":
    sys.exit(main())
