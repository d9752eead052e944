"""The report that people look at: one HTML file with everything in it, and nothing fetched from elsewhere."""

from hicache.sim.report.page import Story, render

__all__ = ["Story", "render"]
