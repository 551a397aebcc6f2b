"""What is evaluated between the steps of a run: held-out loss, loss by position on long rows, needles in haystacks.

The engine that trains is what is evaluated, on all its ranks, and nothing that the next step depends on is touched.
"""
