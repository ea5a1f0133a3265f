"""Reading the small JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fuserve.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20
"""Larger than any tokenizer.json in use; a larger file is not what its name says."""


def read_json_object(path: Path) -> dict[str, Any]:
    """The file's JSON object. Raises CheckpointError if it is anything else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"is larger than {MAX_JSON_BYTES >> 20} MiB.", file=path)
        value = json.loads(path.read_bytes())
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"cannot be read ({reason}).", file=path) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"is not valid JSON ({error}).", file=path, remedy="Fetch the file again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError("holds no JSON object.", file=path, remedy="Fetch the file again.")
    return value


def read_json_object_if_there(path: Path) -> dict[str, Any]:
    """Like ``read_json_object``, but an absent file reads as an empty object."""
    return read_json_object(path) if path.exists() else {}
