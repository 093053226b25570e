"""The command: `python -m evidence [explore | run | report | status | stop | repeat]`; without one: run, then report.

Several processes may run at once; each run is made once and kept in evidence/runs. `stop` lets every process end after
the run that it is at. `repeat` makes a few of the kept runs once more, keeps nothing, and tells how far they come out
from what was kept: nothing on an equal processor.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from evidence import plots, queue, report
from evidence.models import WORK
from evidence.plan import EXPLORED, PLAN, Cell, cells_of
from evidence.runs import Store


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m evidence", description=__doc__)
    parser.add_argument(
        "command", nargs="?", choices=["explore", "run", "report", "status", "stop", "repeat", "all"], default="all"
    )
    parser.add_argument("--model", choices=["gpt", "gpt-series", "smollm2"], help="only this model's runs")
    parser.add_argument("--count", type=int, default=5, help="runs to repeat, of each model")
    given = parser.parse_args(arguments)
    store = Store(WORK)
    stop = WORK / queue.STOP
    if given.command == "stop":
        stop.touch()
        print(f"every process ends after its run; the next `run` removes {stop}")
    if given.command in ("explore", "run", "all"):
        stop.unlink(missing_ok=True)
        cells = EXPLORED if given.command == "explore" else PLAN
        queue.work_off(_of(given.model, cells), store, report=lambda line: print(line, flush=True))
    if given.command in ("report", "all"):
        store.keep()
        drawn = plots.draw(PLAN, store, report.DOCUMENT.parent / "evidence")
        report.DOCUMENT.write_text(report.render(store, drawn))
        print(report.DOCUMENT)
    if given.command == "repeat":
        for line in queue.repeat(_of(given.model, PLAN), store, given.count):
            print(line, flush=True)
    if given.command == "status":
        print(status(_of(given.model, [*EXPLORED, *PLAN]), store))


def status(cells: Sequence[Cell], store: Store) -> str:
    """How many runs of each stage are done."""
    lines = []
    for place in dict.fromkeys((cell.stage, cell.model, cell.domain) for cell in cells):
        these = cells_of(*place, cells)
        stage, model, domain = place
        done, due = sum(len(cell.results(store)) for cell in these), sum(len(cell.seeds) for cell in these)
        tuned = sum(cell.tuning(store).rate() is not None for cell in these)
        lines.append(f"{model:8} {domain:6} {stage:20} {done:4} of {due:4} runs, {tuned} of {len(these)} arms tuned")
    return "\n".join(lines)


def _of(model: str | None, cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if model in (None, cell.model)]


if __name__ == "__main__":
    main()
