"""A fault matrix on real processes: what is broken, when, and what must be true of everybody else afterwards."""
