"""A whole decode step in one kernel, for few rows: see README.md."""
