"""What a run will need and how fast it may be, before it is started."""
