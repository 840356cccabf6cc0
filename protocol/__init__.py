"""What the processes of a search say to each other."""
