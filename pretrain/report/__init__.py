"""What a run says of itself, in one file of records and all that follows it; metrics.py first."""
