"""Floods against a running deployment, while honest requests go on."""
