"""For tests against the embedded engine and its servers."""
