"""Experiments: the serving engine and its policies under a virtual clock."""
