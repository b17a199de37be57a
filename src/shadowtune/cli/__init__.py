"""The command line, ``shadowtune COMMAND ...``: a module for each command, or for two that are alike."""
