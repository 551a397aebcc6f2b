"""The paper's tables: its own numbers beside those of trained models."""
