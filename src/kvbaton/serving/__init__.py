"""The embedded engine and its servers: the first tenant of the library. Needs ``kvbaton[serve]``."""
