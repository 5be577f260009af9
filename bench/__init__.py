"""How fast it is: mock upstream, open-loop load, interleaved arms, one report."""
