"""The inputs of attention layers in place of their keys and values (XQuant, arXiv 2508.10395)."""
