"""Ends what serves a data directory as soon as its supervisor is gone, even by `kill -9`.

The supervisor holds the other end of our standard input and never writes to it: the kernel closes it with the
supervisor, however that ends, on Linux and macOS alike. (PR_SET_PDEATHSIG exists on Linux alone, is dropped when a
process changes its user as Postgres' does here, and reaches no grandchildren.) Should this process be killed as well,
the next `up` ends what is left by the same rule.
"""

import sys
from pathlib import Path

from app.embedded.processes import end_left_behind


def main() -> None:
    folder = Path(sys.argv[1])
    sys.stdin.buffer.read()
    end_left_behind(folder)


if __name__ == "__main__":
    main()
