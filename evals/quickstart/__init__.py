"""The quickstart: a small Titans and a Transformer++ beside it, trained and compared; `__main__.py` is the story."""
