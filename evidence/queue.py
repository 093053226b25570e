"""Working off the plan: any number of processes, each run once, stopped at any moment without loss."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from evidence import models
from evidence.models import WORK, Subject, digest
from evidence.plan import Cell, pending
from evidence.runs import Run, Store
from evidence.training import losses_before, text_that_judges, train

STOP = "stop"
WAIT_SECONDS = 5.0


class NotComparableError(Exception):
    """The stored runs of a model and domain were of other texts, or of a processor that rounds otherwise."""

    def __init__(self, run: Run, message: str) -> None:
        super().__init__(message)
        self.place = _place(run)


def work_off(cells: Sequence[Cell], store: Store, work: Path = WORK, *, report: Callable[[str], None] = print) -> int:
    """Run what is pending until nothing is, or until the file `stop` lies in the work folder; answers how many ran.

    What could not be compared with the stored runs of its model and domain is left out, and told.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    subjects: dict[str, Subject] = {}
    refused: set[tuple[str, str]] = set()
    done = 0
    while not (work / STOP).exists():
        store.refresh()
        waiting = [run for run in pending(cells, store) if _place(run) not in refused]
        if not waiting:
            break
        try:
            finished = _first_free(waiting, store, subjects, work)
        except NotComparableError as error:
            refused.add(error.place)
            report(str(error))
            continue
        if finished is None:  # all of them are in other processes' hands
            time.sleep(WAIT_SECONDS)
            continue
        done += 1
        report(finished)
    return done


def repeat(cells: Sequence[Cell], store: Store, count: int, work: Path = WORK) -> Iterator[str]:
    """Make kept runs again, `count` of each model spread over what confirms; tells both losses of each, in nats."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    confirmed = [cell for cell in cells if cell.purpose == "confirm"]
    for model in dict.fromkeys(cell.model for cell in confirmed):
        kept = [
            (run, result)
            for cell in confirmed
            if cell.model == model
            for run in cell.runs(store) or []
            if (result := store.get(run)) is not None
        ]
        subject = models.load(model, work)  # type: ignore[arg-type]  # a name of the plan
        for run, before in kept[:: max(1, len(kept) // count)][:count]:
            try:
                refuse_others(subject, run, store)
            except NotComparableError as error:
                yield str(error)
                continue
            again = train(subject, run)
            yield (
                f"{_words(run)}: {before.loss:.6f} ({before.machine}), again {again.loss:.6f} ({again.machine}), "
                f"{again.loss - before.loss:+.6f}, {100 * (again.gain - before.gain) / before.gain:+.2f} % of its gain"
            )


def _words(run: Run) -> str:
    choice = run.choice
    return (
        f"{run.model} {run.domain} {run.purpose} {choice.arm} {choice.score} {choice.share:g} "
        f"local {choice.local} published {choice.published or '–'} rate {run.rate:g} seed {run.seed}"
    )


def refuse_others(subject: Subject, run: Run, store: Store) -> None:
    """Raise `NotComparableError` when the run begins elsewhere than the stored ones of its model and domain."""
    texts, (base, english) = digest(run.domain, subject.work), losses_before(subject, run)
    like = (run.model, run.domain, run.length)
    for other, stored in store:
        if (other.model, other.domain, other.length) == like and (
            (stored.texts, stored.english_base) != (texts, english)
            or (text_that_judges(other) == text_that_judges(run) and stored.base != base)
        ):
            raise NotComparableError(
                run,
                f"{run.model} on {run.domain} is left out, since its stored runs could not be compared with runs from "
                f"here: before training the loss was {stored.base:.6f}, and {stored.english_base:.6f} on English, of "
                f"texts {stored.texts}; here {base:.6f} and {english:.6f} of texts {texts}. Other texts: install the "
                "versions of constraints.txt and remove evidence/work. Other losses: the processor rounds otherwise; "
                "with AMX try ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16. Or begin anew: take its runs out of "
                f"evidence/runs/{run.model}.jsonl.",
            )


def _place(run: Run) -> tuple[str, str]:
    return run.model, run.domain


def _first_free(waiting: Sequence[Run], store: Store, subjects: dict[str, Subject], work: Path) -> str | None:
    for run in waiting:
        with store.claim(run) as free:
            if free:
                name = run.model
                if name not in subjects:
                    subjects[name] = models.load(name, work)  # type: ignore[arg-type]  # a name of the plan
                refuse_others(subjects[name], run, store)
                result = train(subjects[name], run)
                store.add(run, result)
                return f"{_words(run)}: {result.base:.3f} → {result.loss:.4f} in {result.cpu_seconds:.1f} s"
    return None
