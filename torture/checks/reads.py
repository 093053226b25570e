"""What clients were told is what there was; a lab sees its own writes; yanks and aliases are where they were put."""

from __future__ import annotations

from dataclasses import dataclass, field

from torture.checks.rules import Record, Rule
from torture.checks.snapshot import text_of
from torture.journal import Operation, Outcome
from torture.schedule import StepKind

Place = tuple[str, float]
FETCHES = (StepKind.FETCH_NEWEST, StepKind.FETCH_PUBLIC)


def answers(rule: Rule, record: Record) -> None:
    """Each version, digest and layer count that an answer told is in the database."""
    versions = {
        (row["model"], float(row["fraction"]), row["number"]): (text_of(row["digest"]), row["lab"])
        for row in record.database["versions"]
    }
    layers = {text_of(row["digest"]): row["layer_count"] for row in record.database["documents"]}
    for operation in record.journal:
        if operation.outcome is not Outcome.ACKNOWLEDGED:
            continue
        asked, told = operation.arguments, operation.answer
        if operation.kind in FETCHES:
            stored = versions.get((asked["model"], asked["checkpoint"], told["version"]))
            rule.expect(stored == (told["digest"], asked["lab"]), f"{operation}: told {told}, stored {stored}")
        elif operation.kind == StepKind.FETCH_DIGEST:
            rule.expect(told["digest"] == asked["digest"] in layers, f"{operation}: asked {asked}, told {told}")
        elif operation.kind == StepKind.LIST_VERSIONS:
            numbers = [number for number, _, _ in told["versions"]]
            expected = list(range(len(numbers), 0, -1))
            rule.expect(numbers == expected, f"{operation}: numbers {numbers}")
            for number, digest, lab in told["versions"]:
                stored = versions.get((asked["model"], asked["checkpoint"], number))
                rule.expect(stored == (digest, lab), f"{operation}: told {number} is {digest}, stored {stored}")
        elif operation.kind == StepKind.AGGREGATE:
            for digest, version, checkpoint, rows in told["layers"]:
                stored = versions.get((asked["model"], checkpoint, version))
                rule.expect(
                    stored is not None and stored[0] == digest and layers.get(digest) == rows,
                    f"{operation}: {rows} rows of version {version}, {digest}; stored {stored}, {layers.get(digest)}",
                )


def known_is_found(rule: Rule, record: Record) -> None:
    """Nobody who asks for a digest that was published is told that there is none."""
    for operation in record.journal:
        if operation.kind in (StepKind.FETCH_DIGEST, StepKind.LIST_VERSIONS):
            rule.expect(operation.outcome is not Outcome.REFUSED, f"{operation}: {operation.error}")


@dataclass
class _Seen:
    """What a lab may expect of its own versions at one checkpoint; None: yanked or not, nobody can tell."""

    yanked: dict[int, bool | None] = field(default_factory=dict)
    unheard: int = 0  # publishes whose version it was never told

    def fits(self, told: int | None) -> bool:
        """Whether the newest that is not yanked can be `told`."""
        surely = max((number for number, yanked in self.yanked.items() if yanked is False), default=None)
        if told is None:
            return surely is None
        if told not in self.yanked:
            return self.unheard > 0 and (surely is None or told > surely)
        return self.yanked[told] is not True and (surely is None or told >= surely)


def own_writes(rule: Rule, record: Record) -> None:
    """A lab that asks for its newest version gets the one that its own publishes and yanks leave: replayed in order."""
    seen: dict[tuple[int, Place], _Seen] = {}
    for operation in record.journal:
        asked = operation.arguments
        if "model" not in asked or "checkpoint" not in asked:
            continue
        state = seen.setdefault((operation.client, (asked["model"], asked["checkpoint"])), _Seen())
        if operation.kind in FETCHES:
            told = operation.answer.get("version")
            if operation.outcome is Outcome.ACKNOWLEDGED or _says_none(operation):
                rule.expect(state.fits(told), f"{operation}: told {told}, known {state}")
        else:
            _replay(operation, state)


def _says_none(operation: Operation) -> bool:
    return operation.outcome is Outcome.REFUSED and "not yanked" in (operation.error or "")


def _replay(operation: Operation, state: _Seen) -> None:
    heard = operation.outcome is Outcome.ACKNOWLEDGED
    if operation.kind in (StepKind.PUBLISH, StepKind.PUBLISH_AGAIN, StepKind.PUBLISH_ATTACHED):
        if heard:
            state.yanked.setdefault(operation.answer["version"], False)
        elif operation.outcome is Outcome.UNKNOWN:
            state.unheard += 1
    elif operation.kind in (StepKind.YANK, StepKind.UNYANK) and operation.outcome is not Outcome.REFUSED:
        number = operation.arguments["version"]
        wanted = operation.kind == StepKind.YANK
        if heard:
            state.yanked[number] = wanted
        elif state.yanked.get(number) is not wanted:
            state.yanked[number] = None


def yanks(rule: Rule, record: Record) -> None:
    """Each version is as its lab's last yank or unyank left it."""
    last: dict[tuple[str, float, int], bool | None] = {}
    for operation in record.journal:
        if operation.kind in (StepKind.YANK, StepKind.UNYANK) and operation.outcome is not Outcome.REFUSED:
            asked = operation.arguments
            place = asked["model"], asked["checkpoint"], asked["version"]
            wanted = operation.kind == StepKind.YANK
            if operation.outcome is Outcome.ACKNOWLEDGED:
                last[place] = wanted
            elif last.get(place, False) is not wanted:
                last[place] = None
    for row in record.database["versions"]:
        place = row["model"], float(row["fraction"]), row["number"]
        expected = last.get(place, False)
        rule.expect(expected in (None, row["yanked"]), f"{place}: yanked is {row['yanked']}, was left {expected}")


def aliases(rule: Rule, record: Record) -> None:
    """The moves of an alias are numbered without gaps, it stands where the last left it, and no told move is lost."""
    moves: dict[tuple[str, str], list[tuple[int, int | None]]] = {}
    for row in record.database["alias_moves"]:
        moves.setdefault((row["model"], row["name"]), []).append((row["revision"], row["version_id"]))
    places = {row["id"]: (row["model"], float(row["fraction"]), row["number"]) for row in record.database["versions"]}
    now = {(row["model"], row["name"]): (row["revision"], row["version_id"]) for row in record.database["aliases"]}
    for alias, history in moves.items():
        revisions = [revision for revision, _ in history]
        rule.expect(revisions == list(range(1, len(history) + 1)), f"{alias}: revisions {revisions}")
        rule.expect(now.get(alias) == history[-1], f"{alias}: stands at {now.get(alias)}, moved last to {history[-1]}")
    for operation in record.journal:
        if operation.kind == StepKind.MOVE_ALIAS and operation.outcome is Outcome.ACKNOWLEDGED:
            asked = operation.arguments
            versions = dict(moves.get((asked["model"], "stable"), ()))
            stored = places.get(versions.get(operation.answer["revision"]) or 0)
            wanted = asked["model"], asked["checkpoint"], asked["version"]
            rule.expect(stored == wanted, f"{operation}: revision {operation.answer['revision']} is of {stored}")
