"""The one plan of a pair of ranks: who writes what where, in how many runs, through which staging area."""
