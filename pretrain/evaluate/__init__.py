"""What is evaluated between steps, by the engine that trains and without a trace in it; evaluations.py first."""
