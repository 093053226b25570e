"""How the processes of a job hear what to do and say what came of it: lines of JSON on stdin and stdout."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

PROGRESS, MEMORY, FAILED, FINISHED = "progress", "memory", "failed", "finished"


class Speaker:
    """Takes stdout for the answers alone: what libraries print goes to the log, not between them."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def say(self, kind: str, content: Any) -> None:
        self._answers.write(json.dumps({kind: content}) + "\n")
        self._answers.flush()


def read_specification() -> bytes:
    """Stdin up to the first line break, unbuffered: the thread that waits for its end reads on from there."""
    line = bytearray()
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return bytes(line)


def end_with_parent(folder: Path) -> None:
    """Stdin ends when the worker does, however it died. Nobody waits for this result any more."""
    while os.read(0, 4096):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
