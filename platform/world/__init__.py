"""The unequal world on the simulated clock: who is reachable, the network, time, and what steers them."""
