"""S-NIAH: a needle in a haystack of noise, streamed through the model in pieces (RULER's niah_single_1)."""
