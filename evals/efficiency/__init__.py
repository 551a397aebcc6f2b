"""How fast and how large: `python -m evals.efficiency memory`."""
