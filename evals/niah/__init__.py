"""S-NIAH: a needle in a haystack, streamed through the model in pieces (RULER's niah_single_1, _2 and _3)."""
