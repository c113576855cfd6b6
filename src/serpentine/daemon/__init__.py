"""The daemon: a containerd, where it is, and how it came to run.

Somebody else's (an address was given), or our own child process.
"""
