"""What a plan would be, explained before anything runs: pools of a model, ranks of a topology, a table, a picture."""
