"""Checkpoints on the Hugging Face hub, `hf://org/name@revision`, through huggingface_hub and its cache.

Which repositories a job may name is the operator's choice (BLUEPRINTS_ALLOWED_HUB), and so is the token. A revision is
resolved to a commit, which the blueprint's provenance names.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

import httpx2
from huggingface_hub import (
    CachedRevisionInfo,
    HfApi,
    constants,
    get_cached_repo_tree,
    scan_cache_dir,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    CacheNotFound,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from gradient_blueprints.cache import RECENT
from worker.sources import SourceRefused, check_sizes, files_of_checkpoint

SCHEME = "hf://"
TIMEOUT = 30.0

logger = logging.getLogger(__name__)


def fetch_snapshot(
    source: str, *, cache: Path, allowed: Sequence[str], token: str | None, max_bytes: int, max_cache_bytes: int
) -> tuple[Path, str]:
    """The folder of the checkpoint's files in the hub's cache, and the commit.

    When the hub cannot be reached, what the cache has of the revision is taken.
    """
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source, re.ASCII)
    if match is None or ".." in (match[2] or "").split("/"):
        raise SourceRefused(f"{source!r} is no hf://org/name@revision")
    repository, revision = match[1], match[2] or constants.DEFAULT_REVISION
    if not any(fnmatchcase(repository, pattern) for pattern in allowed):
        listed = ", ".join(allowed) or "none (the operator sets BLUEPRINTS_ALLOWED_HUB)"
        raise SourceRefused(f"{source!r} is no repository that this worker may fetch: {listed}")
    try:
        info = HfApi(token=token or False).model_info(
            repository, revision=revision, files_metadata=True, timeout=TIMEOUT
        )
    except HFValidationError as invalid:
        raise SourceRefused(f"{source!r} is no hf://org/name@revision: {invalid}") from None
    except GatedRepoError:
        raise SourceRefused(f"{source!r} is gated, and this worker's hub token has no access to it") from None
    except RevisionNotFoundError:
        raise SourceRefused(f"the hub's repository {repository} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise SourceRefused(f"the hub has no repository {repository} that this worker may read") from None
    except (OSError, httpx2.HTTPError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        return _from_cache(source, repository, revision, cache, error)
    files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    sizes = {name: files[name] for name in files_of_checkpoint(files)}
    check_sizes(sizes, max_model_bytes=max_bytes)
    commit = str(info.sha)
    needed = sum(size for name, size in sizes.items() if not _is_cached(cache, repository, commit, name))
    _make_room(cache, needed, max_cache_bytes, keep=commit)
    # `revision` by name, so that the cache remembers which commit it stood for when the hub is away
    folder = snapshot_download(
        repository, revision=revision, cache_dir=cache, token=token or False, allow_patterns=list(sizes)
    )
    return _used(Path(folder))


def _from_cache(source: str, repository: str, revision: str, cache: Path, error: Exception) -> tuple[Path, str]:
    try:
        known = get_cached_repo_tree(repository, revision=revision, cache_dir=cache)
        wanted = list(files_of_checkpoint(file.path for file in known))
        folder = snapshot_download(
            repository, revision=revision, cache_dir=cache, local_files_only=True, allow_patterns=wanted
        )  # which looks whether they are all there: a fetch may have broken off
    except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
        raise SourceRefused(
            f"the hub at {constants.ENDPOINT} cannot be reached from this worker ({_one_line(error)}), and {source!r} "
            "is not in its cache; upload the checkpoint instead (client.upload_checkpoint, then source='store')"
        ) from error
    logger.warning("the hub cannot be reached (%s); %s is taken from the cache", _one_line(error), source)
    return _used(Path(folder))


def _used(folder: Path) -> tuple[Path, str]:
    """Note that a snapshot was used now: for hours at a time, most file systems do not."""
    for file in folder.iterdir():
        with suppress(OSError):  # another account's
            os.utime(file)
    return folder, folder.name


def _is_cached(cache: Path, repository: str, commit: str, name: str) -> bool:
    return isinstance(try_to_load_from_cache(repository, name, cache_dir=cache, revision=commit), str)


def _make_room(cache: Path, needed: int, most: int, *, keep: str) -> None:
    """Remove the longest unused revisions until `needed` bytes fit; but none that another job may be about to take."""
    try:
        found = scan_cache_dir(cache)
    except CacheNotFound:
        return
    now = time.time()
    going: list[str] = []
    for revision in sorted((revision for repo in found.repos for revision in repo.revisions), key=_last_used):
        freed = found.delete_revisions(*going).expected_freed_size  # together, as they may share files
        if found.size_on_disk - freed + needed <= most:
            break
        if revision.commit_hash != keep and now - _last_used(revision) > RECENT:
            going.append(revision.commit_hash)
    found.delete_revisions(*going).execute()


def _last_used(revision: CachedRevisionInfo) -> float:
    return max((file.blob_last_accessed for file in revision.files), default=0.0)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
