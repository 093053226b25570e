"""The files that tell a health check how relay and worker are."""

from __future__ import annotations

from pathlib import Path

from tests.worker.conftest import Broker, Processes, wait_until


def test_a_worker_that_no_longer_hears_the_broker_is_seen_and_the_relay_goes_on(
    processes: Processes, broker: Broker, tmp_path: Path
) -> None:
    of_relay, of_worker = tmp_path / "relay-heartbeat", tmp_path / "worker-heartbeat"
    processes.relay(BLUEPRINTS_HEARTBEAT=str(of_relay))
    processes.worker(BLUEPRINTS_HEARTBEAT=str(of_worker))
    for file in (of_relay, of_worker):
        wait_until(file.exists, what=f"{file.name} begins")
        file.unlink()
        wait_until(file.exists, what=f"{file.name} goes on")

    broker.stop()
    wait_until(lambda: "Trying again in 2.00 seconds" in processes.logs(), what="the worker misses the broker")
    for file in (of_relay, of_worker):
        file.unlink()
    wait_until(of_relay.exists, what="the relay, which tries again, is well")
    wait_until(lambda: "Trying again in 4.00 seconds" in processes.logs(), what="two seconds, a heartbeat's, are over")
    assert not of_worker.exists()

    broker.start()
    wait_until(of_worker.exists, what="the worker hears the broker again")
