"""What a run will need, from its settings alone, a question and its table of terms a file; __main__.py first."""
