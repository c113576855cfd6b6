"""The command line: one file per command, each translating flags into calls of the public API."""
