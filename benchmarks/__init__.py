"""Measurements of this project beside its peers, each in one process run: results as JSON, Markdown and plots."""
