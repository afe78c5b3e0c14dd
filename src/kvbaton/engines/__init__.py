"""Engines that hand over: what they need of a manager (``port``), and adapters for those of others."""
