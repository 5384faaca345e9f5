"""The command line: thin commands, their imports inside their bodies."""
