"""What proves kvbaton, outside the wheel: ``python -m lab NAME`` from the root of the repository."""
