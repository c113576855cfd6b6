"""Values: what the registry, containerd and the caller talk about.  No I/O."""
