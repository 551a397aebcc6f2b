"""What a run reports about itself: records in one file, sinks that follow it, and what people see of it."""
