"""How a run ends, for whoever started it: light to import, for the launcher knows it as well as the workers."""

EXIT_FAILED = 1
"""Something was lost on the way: another start goes on from the last checkpoint."""
EXIT_MISTAKE = 2
"""What was asked cannot be done, and not the next time either."""
EXIT_GIVEN_UP = 3
"""Bad steps that skipping and rewinding did not help; somebody has to look at RUN/autopsy first."""
FINAL = (EXIT_MISTAKE, EXIT_GIVEN_UP)
"""After these a start with the same settings ends the same way: nothing is tried again."""
REQUEUE_FILE = "requeue.json"
"""In the run folder of a run that was stopped before its end, in order."""
