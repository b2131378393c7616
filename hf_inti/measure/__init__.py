"""Counting and timing: each kind of measurement, the tables and the jobs, once."""
