"""Data planes: ways to write memory of one rank into memory of another."""
