"""What a run will need, before anything is loaded: memory, disk, tokens and time."""
