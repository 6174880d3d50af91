"""Frozen records: what the stages hand to one another."""
