"""Every level's methods, their parents and same-budget baselines on real data, in one table; see `__main__`."""
