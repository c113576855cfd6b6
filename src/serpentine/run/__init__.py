"""Running a step on a snapshot: what the process sees, and what becomes of it."""
