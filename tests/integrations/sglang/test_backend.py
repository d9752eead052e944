"""The backend against a real sidecar: every path stores and finds, whatever the layout and the allocator."""

from __future__ import annotations
