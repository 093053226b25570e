"""One run, named by everything that it depends on, and the file that keeps what came of it."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, Literal

RUNS = Path(__file__).parent / "runs"
Purpose = Literal["explore", "tune", "confirm", "meter"]
Data = Literal["random", "predicted", "influence", "similar"]
"""Which sequences are trained on: any, or the best by a strategy (evidence.data)."""


@dataclass(frozen=True)
class Published:
    """What a lab publishes of a domain, as a choice names it.

    `domain*` has rows and columns permuted within each tensor; `domain~25` is profiled on text of which a quarter of
    the sequences is of the domain and the rest English: a blueprint gone stale. `domain>` has the squared movement of
    the weights when the lab fine-tunes on the published sample for one pass. `domain@0.5` is of the checkpoint half
    way through pre-training. With `#` at the end every seed has its own: `domain#` a sample, `domain*#` a permutation.

    >>> Published.parse("code~25")
    Published(domain='code', percent=25, fraction=1.0, permuted=False, moved=False, by_seed=False)
    >>> Published.parse("code@0.5").fraction, Published.parse("code*#").permuted, Published.parse("code#").by_seed
    (0.5, True, True)
    """

    domain: str
    percent: int = 100
    fraction: float = 1.0
    permuted: bool = False
    moved: bool = False
    by_seed: bool = False

    @property
    def own_sample(self) -> bool:
        """Whether the published sample is another one for each seed."""
        return self.by_seed and not self.permuted

    @classmethod
    def parse(cls, name: str) -> Published:
        text, _, fraction = name.rstrip("*>#").partition("@")
        domain, _, percent = text.partition("~")
        return cls(domain, int(percent or 100), float(fraction or 1), "*" in name, ">" in name, name.endswith("#"))


@dataclass(frozen=True)
class Choice:
    """What is trained, and what it is chosen from."""

    arm: str
    """`full`, `coordinates`, `layers`, `library`, `bridged` or the name of an adapter."""
    score: str = ""
    """How coordinates, layers or ranks are dealt out: a name in evidence.scores or evidence.layers, `by` of to_peft."""
    share: float = 1.0
    """Of the trainable parameters."""
    local: int = 0
    """Sequences in the local sample."""
    published: str = ""
    """The domain whose factors are published, or a variant of it (`Published`)."""


@dataclass(frozen=True)
class Run:
    """A fine-tuning run; `key` names it."""

    model: str
    domain: str
    purpose: Purpose
    choice: Choice
    rate: float
    seed: int
    steps: int
    batch: int
    length: int
    schedule: Literal["linear", "constant"] = "linear"
    data: Data = "random"

    @property
    def key(self) -> str:
        described = asdict(self)
        if self.data == "random":
            del described["data"]  # runs from before there was another way keep their keys
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Result:
    """What a run came to. Losses in nats per token; bytes are measured while it trained."""

    base: float
    """Loss before, on the same text: development text for `explore` and `tune`, held-out text for `confirm`."""
    loss: float
    english_base: float
    english: float
    """On the held-out text of the original domain."""
    trained: int
    parameters: int
    optimizer_bytes: int
    """Moments and indices."""
    gradient_bytes: int
    """Gradients held when the optimizer steps."""
    largest_gradient_bytes: int
    """The whole gradient of one tensor that exists for a moment beside them; 0 where gradients are held whole."""
    seconds: float
    cpu_seconds: float
    selection_cpu_seconds: float
    texts: str = ""
    """Digest of the domain's texts."""
    published_texts: str = ""
    """Of the texts that the published factors are of; runs before it was kept have none."""
    when: str = ""
    machine: str = ""
    verdict: str = ""
    """Of the staleness check that the selection was told of."""
    spent: dict[str, float] | None = None
    """Of a run with the purpose `meter`: what the meter of resources could read, by resource."""

    @property
    def gain(self) -> float:
        return self.base - self.loss

    @property
    def training_bytes(self) -> int:
        return self.optimizer_bytes + self.gradient_bytes


class Store:
    """Finished runs, one JSON line each, by model: those that are kept with the code, and new ones in a work folder.

    New ones are kept with `keep`, which the report does first: so the document and the runs beside it always agree,
    while processes go on.
    """

    def __init__(self, work: Path | None = None, kept: Path = RUNS) -> None:
        self._kept, self._work = kept, work
        self._found: dict[str, tuple[Run, Result]] = {}
        self._read: dict[Path, int] = {}
        self.refresh()

    def refresh(self) -> None:
        """Take in what other processes have finished."""
        for path in sorted(self._kept.glob("*.jsonl")) + sorted(self._new.glob("*.jsonl") if self._work else []):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._read[path] = self._read.get(path, 0) + len(line)
                    run, result = _parse(json.loads(line))
                    self._found.setdefault(run.key, (run, result))

    def get(self, run: Run) -> Result | None:
        found = self._found.get(run.key)
        return None if found is None else found[1]

    def __iter__(self) -> Iterator[tuple[Run, Result]]:
        return iter(list(self._found.values()))

    def add(self, run: Run, result: Result) -> None:
        """Store a finished run; a line is written whole."""
        _append(self._new / f"{run.model}.jsonl", [_line(run, result)])
        self.refresh()

    def keep(self) -> None:
        """Write what is new beside the code."""
        already = {run.key for run, _ in Store(kept=self._kept)}
        self.refresh()
        for model in sorted({run.model for run, _ in self}):
            lines = [_line(run, result) for run, result in self if run.model == model and run.key not in already]
            _append(self._kept / f"{model}.jsonl", lines)

    @property
    def _new(self) -> Path:
        assert self._work is not None, "this store only reads"
        return self._work / "runs"

    @contextmanager
    def claim(self, run: Run) -> Iterator[bool]:
        """True when no other process is at this run; the claim ends with the process, however it ends."""
        assert self._work is not None, "this store only reads"
        (self._work / "claims").mkdir(parents=True, exist_ok=True)
        path = self._work / "claims" / f"{run.key}.lock"
        with path.open("w") as file:
            taken = _lock(file)
            if taken:
                self.refresh()
            yield taken and self.get(run) is None
        if taken:
            path.unlink(missing_ok=True)


def _line(run: Run, result: Result) -> str:
    return json.dumps({"key": run.key, "run": asdict(run), "result": asdict(result)}) + "\n"


def _append(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("".join(lines))


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _parse(line: dict[str, Any]) -> tuple[Run, Result]:
    run = Run(**{**line["run"], "choice": Choice(**line["run"]["choice"])})
    known = {each.name for each in fields(Result)}
    return run, Result(**{name: value for name, value in line["result"].items() if name in known})
