"""Adapters to libraries of others, each optional: none is imported before it is used."""
