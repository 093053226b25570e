"""The process that brings a job's sources to this machine: `python -m worker.fetch`, started by `worker.child`.

It has the keys to where they lie (the registry, buckets, the hub) and never opens what it brings: `worker.profile`
does that, and has no keys. Sources that lie under an allowed root need no fetching.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.request import getproxies

from gradient_blueprints import Client
from gradient_blueprints.addresses import read_network
from gradient_blueprints.cache import Cache
from gradient_blueprints.errors import NotFound, PermissionDenied
from gradient_blueprints.file_models import CheckpointFile
from gradient_blueprints.log_lines import LogFormat, hide_secrets, start_logging
from gradient_blueprints.models import NewJob, Progress, format_checkpoint
from worker import buckets, hub
from worker.child import Fetched, Fetching
from worker.guard import ConnectionGuard
from worker.sources import (
    SourceRefused,
    StoreSource,
    check_sizes,
    files_of_checkpoint,
    is_remote,
    read_store_source,
)
from worker.speaking import FAILED, FINISHED, PROGRESS, Speaker, end_with_parent, read_specification

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
Report = Callable[[Progress], None]


def main() -> int:
    speaker = Speaker()
    start_logging(LogFormat.JSON)
    fetching = Fetching.model_validate_json(read_specification())
    hide_secrets((fetching.api_key, fetching.hub_token))
    threading.Thread(target=end_with_parent, args=(fetching.folder,), daemon=True).start()

    def report(progress: Progress) -> None:
        speaker.say(PROGRESS, progress.model_dump(exclude_none=True))

    guard = guard_connections(fetching)
    try:
        fetched = fetch(fetching, report)
    except (SourceRefused, NotFound, PermissionDenied) as refused:
        speaker.say(FAILED, str(refused))
    except Exception:
        if guard.refused is None:
            raise
        speaker.say(
            FAILED,
            f"a source leads where this worker does not connect to: {guard.refused} "
            "(its operator allows private networks with BLUEPRINTS_SOURCE_NETWORKS)",
        )
    else:
        speaker.say(FINISHED, fetched.model_dump(mode="json"))
    return 0


def guard_connections(fetching: Fetching) -> ConnectionGuard:
    """From here on this process connects to public addresses and to what the operator has named alone."""
    guard = ConnectionGuard(map(read_network, fetching.networks))
    sources = [fetching.job.source, *(data.source for data in fetching.job.data.values())]
    proxies = (url for scheme, url in getproxies().items() if scheme != "no")
    named = [fetching.url, os.environ.get("HF_ENDPOINT", ""), *proxies]
    if fetching.allowed_buckets and any(source.startswith(buckets.SCHEME) for source in sources):
        named.append(buckets.settle_operators_part())
    for url in named:
        guard.allow(url)
    guard.put_up()
    return guard


def fetch(fetching: Fetching, report: Report) -> Fetched:
    """Bring every remote source of the job. What cannot be reached now raises; another attempt may reach it."""
    report(Progress(phase="fetching"))
    if fetching.states:
        return Fetched(states=_fetch_states(fetching))
    paths: dict[str, Path] = {}
    revision = None
    job = fetching.job
    if is_remote(job.source):
        folder = _new_folder(fetching.folder, 0)
        if job.source.startswith(hub.SCHEME):
            snapshot, revision = hub.fetch_snapshot(
                job.source,
                cache=fetching.cache / "hub",
                allowed=fetching.allowed_hub,
                token=fetching.hub_token,
                max_bytes=fetching.max_model_bytes,
                max_cache_bytes=fetching.cache_bytes,
            )
            for file in snapshot.iterdir():
                _link(file.resolve(strict=True), folder / file.name)
        elif job.source.startswith(buckets.SCHEME):
            buckets.fetch_folder(
                job.source, folder, allowed=fetching.allowed_buckets, max_bytes=fetching.max_model_bytes, report=report
            )
        else:
            _fetch_checkpoint(fetching, read_store_source(job.source, checkpoint=True), folder, report)
        paths[job.source] = folder
    for number, source in enumerate({data.source for data in job.data.values() if is_remote(data.source)}, start=1):
        folder = _new_folder(fetching.folder, number)
        if source.startswith(hub.SCHEME):
            raise SourceRefused(f"{source!r}: texts are read from local roots, store: and s3://, not from the hub")
        if source.startswith(buckets.SCHEME):
            paths[source] = buckets.fetch_file(
                source, folder, allowed=fetching.allowed_buckets, max_bytes=fetching.max_text_bytes
            )
        else:
            paths[source] = _fetch_text(fetching, read_store_source(source, checkpoint=False), folder)
    return Fetched(paths=paths, weights_revision=revision, roots=(fetching.folder, fetching.cache))


def _new_folder(folder: Path, number: int) -> Path:
    made = folder / "fetched" / str(number)
    made.mkdir(parents=True)
    return made


# --- the registry's own store


def _fetch_states(fetching: Fetching) -> tuple[Path, ...]:
    folder = _new_folder(fetching.folder, 0)
    with Client(fetching.url, api_key=fetching.api_key, cache=False, offline=False) as client:
        return tuple(
            client.fetch_shard_state(fetching.job_id, shard, digest, folder / f"{shard}.safetensors")
            for shard, digest in enumerate(fetching.states)
        )


def _client(fetching: Fetching) -> Client:
    client = Client(fetching.url, api_key=fetching.api_key, cache=fetching.cache / "files", offline=False)
    client.cache = Cache(fetching.cache / "files", max_bytes=fetching.cache_bytes)
    return client


def _fetch_checkpoint(fetching: Fetching, source: StoreSource, folder: Path, report: Report) -> None:
    model_id, checkpoint = _subject(fetching.job, source)
    with _client(fetching) as client:
        found = {file.path: file for file in client.list_checkpoint_files(model_id, checkpoint, lab=fetching.lab)}
        wanted = [found[path] for path in sorted(files_of_checkpoint(found))]
        if not wanted:
            raise SourceRefused(
                f"lab {fetching.lab} has uploaded no checkpoint {model_id} at {checkpoint}: "
                f"client.upload_checkpoint(folder, {model_id!r}, {checkpoint})"
            )
        _check_complete(wanted)
        check_sizes({file.path: file.size for file in wanted}, max_model_bytes=fetching.max_model_bytes)
        done, total = 0, sum(file.size for file in wanted)
        for file in wanted:
            report(Progress(phase="fetching", done=done, total=total))
            _link(client.fetch_checkpoint_file(model_id, checkpoint, file), folder / file.path)
            done += file.size


def _fetch_text(fetching: Fetching, source: StoreSource, folder: Path) -> Path:
    model_id, checkpoint = _subject(fetching.job, source)
    with _client(fetching) as client:
        found = {file.path: file for file in client.list_checkpoint_files(model_id, checkpoint, lab=fetching.lab)}
        file = found.get(source.path)
        if file is None:
            texts = ", ".join(sorted(path for path in found if path.endswith(TEXT_SUFFIXES))) or "none"
            raise SourceRefused(
                f"lab {fetching.lab} has uploaded no {source.path!r} with {model_id} at {checkpoint}; "
                f"of texts there are: {texts}"
            )
        _check_complete([file])
        if file.size > fetching.max_text_bytes:
            raise SourceRefused(
                f"{source.path!r} has {file.size:,} bytes; this worker reads at most {fetching.max_text_bytes:,}"
            )
        target = folder / Path(source.path).name
        _link(client.fetch_checkpoint_file(model_id, checkpoint, file), target)
        return target


def _subject(job: NewJob, source: StoreSource) -> tuple[str, str]:
    return source.model_id or job.model_id, source.checkpoint or format_checkpoint(job.training_checkpoint)


def _check_complete(files: Iterable[CheckpointFile]) -> None:
    for file in files:
        if not file.complete:
            raise SourceRefused(
                f"the upload of {file.path} is not complete ({file.received:,} of {file.size:,} bytes): "
                "call upload_checkpoint again, it goes on where it was"
            )


def _link(cached: Path, place: Path) -> None:
    """A name of its own for a cached file: it stays while the job runs, whatever the cache lets go of."""
    try:
        os.link(cached, place)
    except OSError:  # another file system
        place.symlink_to(cached)


if __name__ == "__main__":
    sys.exit(main())
