"""Does to a running system what the schedule says, and undoes it when its time is over."""

from __future__ import annotations

import heapq
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count

from torture.schedule import Fault, FaultKind, Schedule
from torture.system import System

LOOK_SECONDS = 0.05


def inflict(schedule: Schedule, system: System, began: float) -> Counter[FaultKind]:
    """Every fault of the schedule, `at` counted from `began`; blocks until the last is undone. What was really done."""
    order = count()
    due: list[tuple[float, int, Callable[[], None]]] = []
    done: Counter[FaultKind] = Counter()

    def at(moment: float, action: Callable[[], None]) -> None:
        heapq.heappush(due, (moment, next(order), action))

    def begin(fault: Fault) -> None:
        undo = _begin(fault, system)
        if undo is not None:
            done[fault.kind] += 1
            at(began + fault.at + fault.lasts, undo)
        elif fault.kind is FaultKind.KILL_PROFILER and time.monotonic() < began + fault.at + fault.lasts:
            at(time.monotonic() + LOOK_SECONDS, partial(begin, fault))  # until there is one

    for fault in schedule.faults:
        at(began + fault.at, partial(begin, fault))
    while due:
        moment, _, action = heapq.heappop(due)
        time.sleep(max(0.0, moment - time.monotonic()))
        action()
    return done


def _begin(fault: Fault, system: System) -> Callable[[], None] | None:
    """Begin a fault and answer what undoes it; None when there was nothing to do it to."""
    component = fault.component
    match fault.kind:
        case FaultKind.KILL_API | FaultKind.KILL_WORKER | FaultKind.KILL_RELAY | FaultKind.KILL_BROKER:
            system.kill(component)
            return lambda: system.bring_back(component)
        case FaultKind.KILL_POSTGRES:
            system.kill("postgres")
            return lambda: system.bring_back("postgres")
        case FaultKind.WIPE_BROKER:
            system.kill(component)
            system.wipe_broker()
            return lambda: system.bring_back(component)
        case FaultKind.FREEZE_WORKER:
            system.signal(component, signal.SIGSTOP)
            return lambda: system.signal(component, signal.SIGCONT)
        case FaultKind.KILL_PROFILER:
            return (lambda: None) if system.kill_profiler(component) else None
        case FaultKind.CUT_CLIENTS:
            system.proxy.cut(after=fault.size, reset=fault.number == 1)
            return system.proxy.mend
        case FaultKind.CUT_DATABASE:
            system.database_proxy.cut(after=fault.size, reset=fault.number == 1)
            return system.database_proxy.mend
        case FaultKind.FILL_STORE:
            return system.store.free if system.store.fill() else None
