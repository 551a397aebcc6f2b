"""Long-context evaluation of a trained model: loss by position, needles in haystacks, reports."""
