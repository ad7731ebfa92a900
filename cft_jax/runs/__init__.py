"""What a run is on disk: its directory, its base model, its trained weights."""
