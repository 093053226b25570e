"""A run can be repeated: its schedule comes from the seed alone."""

from __future__ import annotations

from itertools import islice

import pytest

from torture.schedule import FaultKind, Scale, Schedule, make_schedule


def steps_of(schedule: Schedule) -> list[object]:
    return [
        (client, number, kind, draw.random())
        for client in range(schedule.scale.clients)
        for number, kind, draw in islice(schedule.steps(client), 50)
    ]


def test_the_same_seed_gives_the_same_faults_jobs_and_steps_and_another_gives_others() -> None:
    one, same, other = make_schedule(1, 120), make_schedule(1, 120), make_schedule(2, 120)
    assert (one, str(one), steps_of(one)) == (same, str(same), steps_of(same))
    assert one.faults != other.faults
    assert one.jobs != other.jobs
    assert steps_of(one) != steps_of(other)


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_of_fault_comes_and_no_two_hit_the_same_thing_at_once(seed: int) -> None:
    schedule = make_schedule(seed, 120, Scale())
    assert {fault.kind for fault in schedule.faults} == set(FaultKind)
    over: dict[str, float] = {}
    for fault in schedule.faults:
        assert fault.at >= over.get(fault.component, 0.0)
        over[fault.component] = fault.at + fault.lasts
