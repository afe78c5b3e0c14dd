"""Clients of others, their own code, against servers of ours."""
