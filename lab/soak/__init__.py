"""Endurance: many small rooms between two processes, with aborts and restarts, and what grows meanwhile."""
