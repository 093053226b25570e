"""The wire types of checkpoint files: what a lab uploads for the registry's workers to profile."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from gradient_blueprints.models import Count, Digest, LabName, Page, Wire

FILE_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".tiktoken", ".jsonl", ".parquet")
"""Weights, configuration, tokenizer and text: the formats that are data and nothing else."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".msgpack", ".h5", ".npy", ".npz")
"""Weights in formats that can run code when they are read, or whose readers do not check what they read."""

_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
FILE_PATH_PATTERN = rf"{_SEGMENT}(?:/{_SEGMENT}){{0,3}}"
"""At most four names; none begins with a dot, so that no path leads out of its checkpoint."""
LONGEST_FILE_PATH = 200


def _data_only(path: str) -> str:
    if path.lower().endswith(PICKLE_SUFFIXES):
        raise PydanticCustomError(
            "pickled_file",
            "{path} is in a format that can run code when it is read; "
            "save the weights as safetensors: model.save_pretrained(folder)",
            {"path": path},
        )
    if not path.lower().endswith(FILE_SUFFIXES):
        raise PydanticCustomError(
            "file_suffix", "{path} ends in none of {suffixes}", {"path": path, "suffixes": ", ".join(FILE_SUFFIXES)}
        )
    return path


FilePath = Annotated[
    str,
    StringConstraints(max_length=LONGEST_FILE_PATH, pattern=re.compile(rf"^{FILE_PATH_PATTERN}\Z")),
    AfterValidator(_data_only),
]


class CheckpointFile(Wire):
    """One file of a checkpoint in the registry's store."""

    path: str
    lab: LabName
    size: Count = Field(description="bytes of the whole file")
    digest: Digest
    received: Count = Field(description="bytes that are there; an upload goes on from here")
    complete: bool = Field(description="all bytes are there and have the digest; the file cannot change any more")


class CheckpointFilePage(Page):
    files: tuple[CheckpointFile, ...]
