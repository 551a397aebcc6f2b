"""What a run does about bad steps, ranks that hang, signals and failures; health.py first."""
