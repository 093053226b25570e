"""`python -m worker`: takes jobs from the broker and works on one at a time, until SIGTERM."""

from __future__ import annotations

import logging
import os
import sys

from pydantic import ValidationError

from gradient_blueprints.log_lines import hide_secrets, passwords_in, start_logging
from gradient_blueprints.tracing import start_tracing
from worker.device import device_fault
from worker.folders import remove_abandoned
from worker.metrics import serve_metrics
from worker.settings import WorkerSettings
from worker.tasks import ARGUMENTS, create_worker


def main() -> int:
    try:
        settings = WorkerSettings(_secrets_dir=os.environ.get("BLUEPRINTS_SECRETS_DIR"))
    except ValidationError as invalid:
        for fault in invalid.errors(include_input=False):
            name = "BLUEPRINTS_" + "_".join(map(str, fault["loc"])).upper()
            print(f"{name}: {fault['msg']}", file=sys.stderr)
        return 2
    if unusable := device_fault(settings.device):
        print(f"BLUEPRINTS_DEVICE: {unusable}", file=sys.stderr)
        return 2
    start_logging(settings.log_format)
    hide_secrets(key.get_secret_value() for key in (settings.api_key, settings.hub_token) if key is not None)
    hide_secrets(passwords_in(settings.broker_url))
    start_tracing("gradient-blueprints-worker", os.environ)
    if not settings.allowed_roots:
        logging.warning("BLUEPRINTS_ALLOWED_ROOTS is not set: every job that names a local path will fail")
    remove_abandoned()
    if settings.worker_metrics is not None:
        serve_metrics(settings.worker_metrics)
    create_worker(settings).worker_main(list(ARGUMENTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
