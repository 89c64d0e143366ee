"""Which sample comes when, by arithmetic: permutations, mixtures, positions that are left out. Numpy only."""
