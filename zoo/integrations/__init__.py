"""Adapters to other libraries, each optional: none is imported before it is used."""
