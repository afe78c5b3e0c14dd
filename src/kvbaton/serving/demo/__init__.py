"""The demo: a prompt prefilled in one process and decoded in another, compared with a single process."""
