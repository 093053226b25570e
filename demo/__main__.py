"""The command `python -m demo`: the whole story on real models, against the service running on this machine."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType

# Before torch and transformers are loaded: nothing is looked up on a hub, threads that wait do not spin, for the worker
# needs the cores, and the bars are the demo's own.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TQDM_DISABLE": "1",
}

from demo.models import WheelMissing
from demo.service import Service, ServiceFailed
from demo.story import FULL, SHORT, play

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder for models, texts and data")
    parser.add_argument("--report", type=Path, default=HERE / "report.html", help="the page to write")
    parser.add_argument("--short", action="store_true", help="only a tiny GPT and few steps: under a minute")
    parser.add_argument("--url", help="a registry that runs already, with its admin key in BLUEPRINTS_API_KEY")
    arguments = parser.parse_args()
    elsewhere = None
    if arguments.url is not None:
        elsewhere = Service(arguments.url, os.environ["BLUEPRINTS_API_KEY"], here=False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a shell lets its background jobs ignore the first
        signal.signal(number, _interrupt)
    try:
        play(arguments.work.resolve(), arguments.report.resolve(), SHORT if arguments.short else FULL, elsewhere)
    except KeyboardInterrupt:
        print("\ninterrupted; everything that was started is stopped", file=sys.stderr)
        return 130
    except (ServiceFailed, WheelMissing) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
