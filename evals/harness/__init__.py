"""The paper's nine language and commonsense tasks, through lm-eval's own task files."""
