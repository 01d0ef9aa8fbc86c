"""The report: its text, its builder, and the results that both read."""
