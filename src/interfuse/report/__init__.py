"""What a person reads at the end: one HTML page. Terminal tables are `evaluation.comparison`'s."""
