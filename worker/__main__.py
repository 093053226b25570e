"""`python -m worker`: takes jobs from the broker and works on one at a time, until SIGTERM."""

from __future__ import annotations

import logging
import os
import sys

from pydantic import ValidationError

from worker.settings import WorkerSettings
from worker.tasks import ARGUMENTS, create_worker


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        settings = WorkerSettings(_secrets_dir=os.environ.get("BLUEPRINTS_SECRETS_DIR"))
    except ValidationError as invalid:
        for fault in invalid.errors(include_input=False):
            name = "BLUEPRINTS_" + "_".join(map(str, fault["loc"])).upper()
            print(f"{name}: {fault['msg']}", file=sys.stderr)
        return 2
    if not settings.allowed_roots:
        logging.warning("BLUEPRINTS_ALLOWED_ROOTS is not set: every job that names a local path will fail")
    create_worker(settings).worker_main(list(ARGUMENTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
