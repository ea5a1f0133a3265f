"""Every kernel test runs with each instruction set that this machine has."""

from __future__ import annotations

import pytest

from fuserve import _native


@pytest.fixture(params=_native.available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FUSERVE_ISA", request.param)
    return str(request.param)
