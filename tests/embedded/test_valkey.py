"""The embedded Valkey, as a real server."""

import os
import signal
from pathlib import Path

import psutil
import pytest
import redis

from app.embedded import valkey
from app.embedded.processes import CannotStart, left_behind


def test_demands_its_password_and_never_drops_a_message(private_folder: Path) -> None:
    server = valkey.start(private_folder / "valkey")
    try:
        with redis.Redis(port=server.port) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
        with redis.Redis.from_url(server.url) as broker:
            assert broker.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            assert broker.config_get("appendonly") == {"appendonly": "yes"}
        connections = psutil.Process(server.process.pid).net_connections()
        addresses = {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN}
        assert addresses == {"127.0.0.1"}
        password = server.url.split(":")[2].split("@")[0]
        assert password not in " ".join(psutil.Process(server.process.pid).cmdline())
    finally:
        valkey.stop(server)
    assert left_behind(private_folder) == []


def test_keeps_what_it_was_told_over_a_kill(private_folder: Path) -> None:
    server = valkey.start(private_folder / "valkey")
    with redis.Redis.from_url(server.url) as broker:
        broker.lpush("queue", "job 7")
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    server = valkey.start(private_folder / "valkey")
    try:
        with redis.Redis.from_url(server.url) as broker:
            assert broker.lrange("queue", 0, -1) == [b"job 7"]
    finally:
        valkey.stop(server)


def test_ends_a_server_that_a_killed_owner_left_running(private_folder: Path) -> None:
    forgotten = valkey.start(private_folder / "valkey")
    server = valkey.start(private_folder / "valkey")
    try:
        assert forgotten.process.wait(5) == 0
    finally:
        valkey.stop(server)


def test_a_folder_with_quotes_and_blanks(private_folder: Path) -> None:
    folder = private_folder / 'the "new" disk' / "valkey"
    folder.parent.mkdir()
    server = valkey.start(folder)
    try:
        assert (folder / "appendonlydir").exists()
    finally:
        valkey.stop(server)


def test_says_so_when_its_port_is_taken(private_folder: Path) -> None:
    other = valkey.start(private_folder / "other", log=private_folder / "other.log", durable=False)
    try:
        with pytest.raises(CannotStart, match="Address already in use"):
            valkey.start(private_folder / "valkey", port=other.port)
    finally:
        valkey.stop(other)
