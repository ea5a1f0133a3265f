"""Whether all ranks have the same program and the same model."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version

from fuserve.architectures import DecoderSpec
from fuserve.checkpoints import Checkpoint
from fuserve.errors import RankFailedError


@dataclass(frozen=True, slots=True)
class RankIdentity:
    """What must be the same in all ranks.

    Attributes:
        version: of fuserve.
        model_digest: of the checkpoint's config and weights.
        where: host and model path, for people.
    """

    version: str
    model_digest: str
    where: str


def identity_of(
    checkpoint: Checkpoint | None, spec: DecoderSpec, model: str, host: str
) -> RankIdentity:
    """This process's identity; a dummy model is known by its spec."""
    if checkpoint is None:
        digest, path = hashlib.sha256(repr(spec).encode()).hexdigest(), model
    else:
        digest, path = checkpoint.content_key(), str(checkpoint.path)
    return RankIdentity(version("fuserve"), digest, f"{host}:{path}")


def check_identities(identities: Mapping[int, RankIdentity]) -> None:
    """Refuse a group whose ranks differ.

    Raises:
        RankFailedError: naming the ranks that are not as most are, or not as rank 0 is.
    """
    for field, what, remedy in (
        ("version", "fuserve", "Install the same version of fuserve on all hosts."),
        ("model_digest", "model files", "Copy the same model files to all hosts."),
    ):
        values = {rank: getattr(identity, field) for rank, identity in identities.items()}
        common = _common(values)
        odd = [rank for rank, value in values.items() if value != common]
        if odd:
            usual = min(rank for rank in values if rank not in odd)
            ranks = ", ".join(
                f"rank {rank} ({identities[rank].where}) has {what} {values[rank][:16]}"
                for rank in odd
            )
            raise RankFailedError(
                f"{ranks}, but rank {usual} ({identities[usual].where}) has {common[:16]}. {remedy}"
            )


def _common(values: Mapping[int, str]) -> str:
    """The value of more than half of the ranks, or else rank 0's."""
    value, count = Counter(values.values()).most_common(1)[0]
    return value if 2 * count > len(values) else values[0]
