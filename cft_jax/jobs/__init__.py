"""What the commands do once their flags and their configuration are found right: all that takes JAX to import."""
