"""Folders as other projects write them: config.json and tensors under their own names, read and written."""
