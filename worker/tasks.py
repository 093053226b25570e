"""The Celery side of a worker: one task, whose message carries a job's id and nothing else."""

from __future__ import annotations

import logging
import threading
from contextvars import copy_context
from typing import Any

from celery import Celery
from celery.exceptions import Reject
from celery.signals import worker_shutting_down

from gradient_blueprints.errors import Conflict
from gradient_blueprints.log_lines import add_ids
from gradient_blueprints.models import MAX_TIME_LIMIT, PROFILE_QUEUE, PROFILE_TASK
from gradient_blueprints.tracing import span
from worker.attempts import NotClaimed, work_on
from worker.heartbeat import keep_heartbeat
from worker.settings import WorkerSettings

logger = logging.getLogger(__name__)

# Redis hands a message out again that was not acknowledged for this long. Nothing here waits for that: a lost worker's
# job is announced anew by the registry's sweeper, so it only must never strike a job that still runs.
VISIBILITY_TIMEOUT = MAX_TIME_LIMIT + 86_400

ARGUMENTS = (
    "--quiet",  # no banner among the lines of the log
    "worker",
    # One thread, because the work itself is done by a subprocess and the thread only watches over it. Celery's main
    # loop lives on beside it and hears signals at once; prefork would add a fork that gains nothing, and solo would
    # leave the broker's connection unattended for as long as a job runs.
    "--pool=threads",
    "--concurrency=1",
    "--without-gossip",
    "--without-mingle",
    "--without-heartbeat",
    "--loglevel=INFO",
)


def create_worker(settings: WorkerSettings) -> Celery:
    celery = Celery("gradient-blueprints", broker=settings.broker_url, set_as_current=False)
    celery.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_default_queue=PROFILE_QUEUE,
        task_ignore_result=True,
        result_backend=None,
        task_acks_late=True,
        task_reject_on_worker_lost=False,  # our lease does that, and counts
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,  # the claim decides who works, not the broker
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "visibility_timeout": VISIBILITY_TIMEOUT,
            "socket_keepalive": True,
            "health_check_interval": 25,
        },
    )
    if settings.heartbeat is not None:
        keep_heartbeat(celery, settings.heartbeat)
    stopping = threading.Event()

    def stop(**_: Any) -> None:
        stopping.set()

    worker_shutting_down.connect(stop, weak=False)

    @celery.task(name=PROFILE_TASK, bind=True)  # type: ignore[untyped-decorator] # Celery has no types
    def profile_checkpoint(task: Any, job_id: str) -> None:
        def work() -> None:
            add_ids(job_id=job_id, request_id=task.request.get("request_id"))
            parent, attributes = task.request.get("traceparent"), {"blueprints.job_id": job_id}
            with span("work on job", "consumer", parent=parent, attributes=attributes) as opened:
                if opened is not None:
                    add_ids(trace_id=f"{opened.get_span_context().trace_id:032x}")
                work_on(job_id, settings, stopping)

        try:
            copy_context().run(work)  # the thread goes on to other jobs
        except NotClaimed as undone:
            raise Reject(str(undone), requeue=True) from None
        except Conflict as lost:
            logger.warning("job %s: %s", job_id, lost)

    return celery
