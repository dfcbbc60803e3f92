"""A first quarter of an hour on a GPU: the calls of a bare machine without network, and what travels there."""
