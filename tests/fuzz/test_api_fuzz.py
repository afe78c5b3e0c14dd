"""A short run of schemathesis against every kind of server; skipped where it is not installed (see ``make fuzz``)."""

from __future__ import annotations

import pytest

pytest.importorskip("schemathesis", reason="pip install 'kvbaton[fuzz]'")

from fuzz.api_fuzz import KINDS, fuzz, servers


def test_the_apis_are_what_their_documents_say() -> None:
    with servers() as urls:
        for kind in KINDS:
            result = fuzz(kind, urls[kind], examples=5)
            assert not result["broken"], result["said"]
            assert result["cases"], result["said"]
