"""A run saved, kept, and gone on from, at the same layout or another; format.py first, which says what lies where."""
