"""``--ray-address`` of a cluster that is not there."""

from __future__ import annotations

import pytest

from fuserve.errors import FuserveError

start = pytest.importorskip("fuserve.server.replicas.start")


def test_a_cluster_that_cannot_be_joined_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster\nand much more")

    monkeypatch.setattr(start.ray, "init", refuse)
    with pytest.raises(FuserveError, match=r"joined at host1:6379 \(Failed .* cluster\)"):
        start._join("host1:6379")
