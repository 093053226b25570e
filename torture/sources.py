"""`python -m torture.sources FOLDER`: the checkpoint and the text that jobs profile, made where torch may be loaded."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.worker.checkpoints import make_checkpoint, make_texts


def main() -> None:
    folder = Path(sys.argv[1])
    make_texts(folder)
    make_checkpoint(folder / "tiny", folder / "general.txt")


if __name__ == "__main__":
    main()
