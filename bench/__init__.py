"""How fast cq is, how much memory it takes, and how good what it writes is."""
