"""A model that people use, single and as a pair."""
