"""What every package may use: errors, random keys, files, the command line."""
