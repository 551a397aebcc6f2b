"""Every system of the paper's table, trained under one budget and compared."""
