"""The workers of a run, started, watched and started again on one host or many; __main__.py first."""
