"""What becomes of a run: its folder, earlier attempts, what is reported, what is remembered of a failure."""
