"""Measurements: each script writes JSON, and tables are made from the JSON alone."""
