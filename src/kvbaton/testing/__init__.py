"""Public kit for people who build on kvbaton: an in-memory world of ranks, and conformance suites."""
