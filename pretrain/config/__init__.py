"""A run's settings, from the command line and its files to one frozen tree; run_config.py first."""
