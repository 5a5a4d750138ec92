"""Ranks: what the launcher said, where peers lie, and the collectives between them."""
