"""Serpentine."""
