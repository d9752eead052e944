"""Adapters of inference engines, over the client. Each is imported by name and needs its engine installed."""
