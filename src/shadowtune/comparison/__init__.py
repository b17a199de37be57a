"""Storey 6: methods against each other on tasks, from one file of settings to a report."""
