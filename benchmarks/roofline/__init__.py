"""Decoding from X in place of K and V (XQuant): up to which context length it is free, computed and measured."""
