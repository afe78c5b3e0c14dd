"""Failures inside the kits show values, as failures in tests do."""

import pytest

for kit in ("transport_conformance", "links_conformance"):
    pytest.register_assert_rewrite(f"kvbaton.testing.{kit}")
