"""Experiments away from a running cache: traces, and the engine under a virtual clock."""
