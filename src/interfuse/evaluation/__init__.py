"""How good models are and what they cost: metrics with intervals, costs, and the table that shows both."""
