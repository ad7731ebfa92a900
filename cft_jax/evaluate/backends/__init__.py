"""What runs the model that is measured: this package, or transformers."""
