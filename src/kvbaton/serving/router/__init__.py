"""The router: one address in front of prefill and decode servers; see ``router``."""
