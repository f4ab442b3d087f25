"""Texts that people have, and what a rule does to them."""
