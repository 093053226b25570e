"""Checkpoints and texts that strangers name: found under the allowed roots only, checked before anything loads them."""

from __future__ import annotations

import errno
import json
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

from gradient_blueprints.canonical import DIGEST_PREFIX, digest_of
from gradient_blueprints.file_models import FILE_PATH_PATTERN, PICKLE_SUFFIXES
from gradient_blueprints.models import MODEL_ID_PATTERN, NewJob, format_checkpoint

MAX_HEADER_BYTES = 100_000_000  # of a safetensors file; the format's own limit
MAX_JSON_BYTES = 256 << 20  # a tokenizer.json with a large vocabulary has 20 MB
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_JSON = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
TOKENIZER_FILES = (
    *TOKENIZER_JSON,
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
REFUSED_MEMBERS = {
    "auto_map": "asks for code of its own (auto_map), which is never run; use a model class that transformers has",
    "quantization_config": "is quantized (quantization_config); submit the weights in floating point",
}


MANY_LAYERS = 1_000  # fewer cost nothing, however few tensors there are
WEIGHTS_PATTERN = r"[\w.-]+\.safetensors"
SHARD_PATTERN = r"model[\w.-]*-of-\d+\.safetensors"
STORE = "store"
FAULTS_OF_SOURCE = {
    None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG,
    errno.EINVAL,
}  # fmt: skip


class SourceRefused(Exception):
    """A source that cannot be used; the text is the reason that whoever submitted the job reads."""


def raise_fault_of_machine(error: BaseException) -> None:
    """Raise an error again that another attempt may not meet: a disk that fails or is full, too many open files.

    A file that is missing or closed to this worker is the source's fault, and so is what libraries say of a file's
    content with an OSError of their own, which has no number.
    """
    if isinstance(error, OSError) and error.errno not in FAULTS_OF_SOURCE:
        raise error


# --- sources that lie elsewhere and are fetched first


def is_remote(source: str) -> bool:
    return source == STORE or source.startswith((f"{STORE}:", "s3://", "hf://"))


def needs_fetching(job: NewJob) -> bool:
    return is_remote(job.source) or any(is_remote(data.source) for data in job.data.values())


def files_of_checkpoint(names: Iterable[str]) -> set[str]:
    """Those of a folder's files that `resolve_checkpoint` looks at, as far as names tell before anything is fetched.

    Some repositories hold the same weights again, `consolidated.safetensors` beside the shards. An index may name other
    files than shards (`mtp.safetensors`), so only what is known to be such a copy is left out.
    """
    names = set(names)
    weights = {name for name in names if re.fullmatch(WEIGHTS_PATTERN, name)}
    if INDEX_FILE not in names and SINGLE_FILE in names:
        weights = {SINGLE_FILE}
    elif INDEX_FILE in names and any(re.fullmatch(SHARD_PATTERN, name) for name in weights):
        weights = {name for name in weights if name != SINGLE_FILE and not name.startswith("consolidated")}
    return weights | (names & {"config.json", INDEX_FILE, *TOKENIZER_FILES})


def check_sizes(sizes: Mapping[str, int], *, max_model_bytes: int) -> None:
    """SourceRefused when the files of a checkpoint, by name, are too large; asked before any of them is fetched."""
    weights = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    if weights > max_model_bytes:
        raise SourceRefused(f"the weights have {weights:,} bytes; this worker takes at most {max_model_bytes:,}")
    for name, size in sizes.items():
        if size > MAX_JSON_BYTES and not name.endswith(".safetensors"):
            raise SourceRefused(f"{name!r} has {size:,} bytes; this worker reads at most {MAX_JSON_BYTES:,}")


@dataclass(frozen=True)
class StoreSource:
    """A checkpoint in the registry's store, or a file beside it; the job's own checkpoint where none is named."""

    model_id: str | None
    checkpoint: str | None
    path: str = ""


def read_store_source(source: str, *, checkpoint: bool) -> StoreSource:
    """`store` or `store:MODEL@CHECKPOINT` of a checkpoint; `store:PATH` or `store:MODEL@CHECKPOINT/PATH` of a text."""
    subject = rf"({MODEL_ID_PATTERN})@([0-9.eE-]+)"
    if checkpoint:
        match = re.fullmatch(rf"{STORE}(?::{subject})?", source)
        known = "store, or store:MODEL@CHECKPOINT"
    else:
        match = re.fullmatch(rf"{STORE}:(?:{subject}/)?({FILE_PATH_PATTERN})", source)
        known = "store:PATH, or store:MODEL@CHECKPOINT/PATH"
    if match is None:
        raise SourceRefused(f"{source!r} is not {known}")
    model_id, fraction, *path = match.groups()
    return StoreSource(model_id, fraction and _fraction(source, fraction), *path)


def _fraction(source: str, text: str) -> str:
    try:
        return format_checkpoint(text)
    except ValueError as error:
        raise SourceRefused(f"{source!r}: {error}") from None


# --- what lies on this machine


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint whose every file was looked at."""

    folder: Path
    config: dict[str, Any]
    weights: dict[str, Path]  # by the name in the folder
    weight_bytes: int
    tensors: int
    tokenizer: dict[str, Path]
    index: Path | None

    def digest(self) -> str:
        """Over the names and SHA-256 of the weight files: the same weights in another folder have the same digest."""
        lines = (f"{file_digest(path)} {name}\n" for name, path in sorted(self.weights.items()))
        return digest_of("".join(lines).encode())

    def link_into(self, view: Path) -> None:
        """Make a folder of the checked files alone: a loader comes across nothing else that lies beside them."""
        view.mkdir()
        (view / "config.json").write_text(json.dumps(self.config))
        for name, path in (self.weights | self.tokenizer).items():
            (view / name).symlink_to(path)
        if self.index is not None:
            (view / INDEX_FILE).symlink_to(self.index)


def resolve(source: str, roots: Sequence[Path]) -> Path:
    """The real path of a source. What lies outside the roots is refused in the same words whether it exists or not."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
        raise SourceRefused(f"{source!r} is a URL; this worker reads local paths under its allowed roots only")
    if not Path(source).is_absolute():
        raise SourceRefused(f"{source!r} is a relative path; give an absolute one as the worker sees it")
    try:
        path = Path(source).resolve()
    except (OSError, RuntimeError) as error:
        raise SourceRefused(f"{source!r} cannot be followed: {error}") from None
    if not any(path.is_relative_to(root.resolve()) for root in roots):
        allowed = ", ".join(map(str, roots)) or "none (the operator sets BLUEPRINTS_ALLOWED_ROOTS)"
        raise SourceRefused(f"{source!r} does not lie under an allowed root of this worker: {allowed}")
    return path


def resolve_file(source: str, roots: Sequence[Path], *, limit: int) -> Path:
    """A regular file of at most `limit` bytes. Anything else, a pipe say, could block its reader for ever."""
    path = resolve(source, roots)
    try:
        status = path.stat()
    except OSError as error:
        raise_fault_of_machine(error)
        raise SourceRefused(f"{source!r} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise SourceRefused(f"{source!r} is not a regular file")
    if status.st_size > limit:
        raise SourceRefused(f"{source!r} has {status.st_size:,} bytes; this worker reads at most {limit:,}")
    return path


def resolve_checkpoint(source: str, roots: Sequence[Path], *, max_model_bytes: int) -> CheckpointFiles:
    """Check a folder with config.json and safetensors, as `save_pretrained` writes it."""
    folder = resolve(source, roots)
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise_fault_of_machine(error)
        raise SourceRefused(f"{source!r} cannot be opened as a folder: {error.strerror}") from None
    if "config.json" not in names:
        raise SourceRefused(f"{source!r} holds no config.json; give a folder written by save_pretrained")

    def file(name: str, limit: int) -> Path:
        return resolve_file(str(folder / name), roots, limit=limit)

    config = read_json(file("config.json", MAX_JSON_BYTES))
    for member, reason in REFUSED_MEMBERS.items():
        if _mentions(config, member):
            raise SourceRefused(f"the checkpoint {reason}")
    index, weights = _weight_files(folder, names, file, max_model_bytes)
    sizes = [size for path in weights.values() for size in check_safetensors(path).values()]
    if sum(sizes) > max_model_bytes:
        raise SourceRefused(f"the weights have {sum(sizes):,} bytes; this worker takes at most {max_model_bytes:,}")
    _check_layers(config, max(MANY_LAYERS, len(sizes)))
    tokenizer = {name: file(name, MAX_JSON_BYTES) for name in TOKENIZER_FILES if name in names}
    for name in tokenizer.keys() & set(TOKENIZER_JSON):
        if _mentions(read_json(tokenizer[name]), "auto_map", depth=2):
            raise SourceRefused(f"the tokenizer {REFUSED_MEMBERS['auto_map']}")
    return CheckpointFiles(folder, config, weights, sum(sizes), len(sizes), tokenizer, index)


def _weight_files(
    folder: Path, names: list[str], file: Any, max_model_bytes: int
) -> tuple[Path | None, dict[str, Path]]:
    if INDEX_FILE in names:
        index = file(INDEX_FILE, MAX_JSON_BYTES)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise SourceRefused(f"{INDEX_FILE} has no weight_map")
        shards = sorted(set(map(str, weight_map.values())))
        for shard in shards:
            if not re.fullmatch(WEIGHTS_PATTERN, shard):
                raise SourceRefused(f"{INDEX_FILE} names {shard!r}, which is no safetensors file of this folder")
        return index, {shard: file(shard, max_model_bytes) for shard in shards}
    if SINGLE_FILE in names:
        return None, {SINGLE_FILE: file(SINGLE_FILE, max_model_bytes)}
    pickled = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickled:
        raise SourceRefused(
            f"the weights are in {pickled[0]}, a format that can run code when it is read; "
            "save them as safetensors: model.save_pretrained(folder)"
        )
    raise SourceRefused(f"{folder.name!r} holds no {SINGLE_FILE}; give a folder written by save_pretrained")


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SourceRefused(f"{path.name} is not JSON that can be read: {error}") from None
    if not isinstance(content, dict):
        raise SourceRefused(f"{path.name} is not a JSON object")
    return content


def _mentions(value: Any, member: str, depth: int = 8) -> bool:
    """Whether an object holds `member`, at its top or within: configurations nest others."""
    if depth == 0 or not isinstance(value, dict):
        return False
    if value.get(member):
        return True
    return any(_mentions(inner, member, depth - 1) for inner in value.values())


def _check_layers(config: dict[str, Any], most: int, depth: int = 8) -> None:
    """Some configurations make a list as long as this number when they are read."""
    for member, value in config.items():
        if isinstance(value, dict) and depth:
            _check_layers(value, most, depth - 1)
        elif re.search("layers?$", member) and isinstance(value, int | float) and value > most:
            raise SourceRefused(
                f"config.json asks for {value:,} ({member}), far more than the weights have tensors for"
            )


def check_safetensors(path: Path) -> dict[str, int]:
    """The bytes of each tensor, once the header was found true: within the file, without overlap or gap."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise SourceRefused(
                f"{path.name} is cut short or no safetensors file: its header would have {length:,} bytes"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique_members)
    except (ValueError, RecursionError) as error:
        raise SourceRefused(f"{path.name} has a header that cannot be read: {error}") from None
    if not isinstance(header, dict):
        raise SourceRefused(f"{path.name} has a header that is not a JSON object")
    header.pop("__metadata__", None)
    spans = {name: _span(path, name, entry) for name, entry in header.items()}
    end = 0
    for begin, stop, name in sorted((begin, stop, name) for name, (begin, stop) in spans.items()):
        if begin != end:
            fault = "overlaps another tensor" if begin < end else "leaves a gap before it"
            raise SourceRefused(f"{path.name}: tensor {name!r} {fault} (byte {begin:,}, expected {end:,})")
        end = stop
    if end != size - 8 - length:
        raise SourceRefused(
            f"{path.name} holds {size - 8 - length:,} bytes of tensors, and its header speaks of {end:,}: "
            "it was cut short or added to"
        )
    return {name: stop - begin for name, (begin, stop) in spans.items()}


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a name appears twice")
    return members


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(stop)]} if all(
            type(extent) is int and extent >= 0 for extent in shape
        ):
            if dtype not in DTYPE_BYTES:
                raise SourceRefused(f"{path.name}: tensor {name!r} has the unknown dtype {dtype!r}")
            wanted = prod(shape) * DTYPE_BYTES[dtype]
            if begin < 0 or stop - begin != wanted:
                raise SourceRefused(
                    f"{path.name}: tensor {name!r} needs {wanted:,} bytes by its shape, "
                    f"and its offsets give {stop - begin:,}"
                )
            return begin, stop
    raise SourceRefused(f"{path.name}: the header's entry of tensor {name!r} is malformed")


def file_digest(path: Path) -> str:
    """`sha256:...` of a file that may be larger than memory."""
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return DIGEST_PREFIX + digest.hexdigest()
