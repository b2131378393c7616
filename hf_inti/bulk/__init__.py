"""Scores or features of many videos, on one machine or a cluster."""
