"""X in place of K and V (XQuant, arXiv 2508.10395), simulated: what it costs in bits and accuracy."""
