"""Working off the plan: any number of processes, each run once, stopped at any moment without loss."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from evidence import models
from evidence.models import WORK, Subject
from evidence.plan import Cell, pending
from evidence.runs import Run, Store
from evidence.training import train

STOP = "stop"
WAIT_SECONDS = 5.0


def work_off(cells: Sequence[Cell], store: Store, work: Path = WORK, *, report: Callable[[str], None] = print) -> int:
    """Run what is pending until nothing is, or until the file `stop` lies in the work folder; answers how many ran."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    subjects: dict[str, Subject] = {}
    done = 0
    while not (work / STOP).exists():
        store.refresh()
        waiting = list(pending(cells, store))
        if not waiting:
            break
        finished = _first_free(waiting, store, subjects, work)
        if finished is None:  # all of them are in other processes' hands
            time.sleep(WAIT_SECONDS)
            continue
        done += 1
        report(finished)
    return done


def _first_free(waiting: Sequence[Run], store: Store, subjects: dict[str, Subject], work: Path) -> str | None:
    for run in waiting:
        with store.claim(run) as free:
            if free:
                name = run.model
                if name not in subjects:
                    subjects[name] = models.load(name, work)  # type: ignore[arg-type]  # a name of the plan
                result = train(subjects[name], run)
                store.add(run, result)
                choice = run.choice
                return (
                    f"{run.model} {run.domain} {run.purpose} {choice.arm} {choice.score} {choice.share:g} "
                    f"local {choice.local} published {choice.published or '–'} rate {run.rate:g} seed {run.seed}: "
                    f"{result.base:.3f} → {result.loss:.4f} in {result.cpu_seconds:.1f} s"
                )
    return None
