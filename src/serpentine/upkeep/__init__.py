"""Looking after what is there: how much it is, what can go, and whether it is whole."""
