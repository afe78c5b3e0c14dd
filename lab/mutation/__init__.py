"""Mutation testing of the protocol."""
