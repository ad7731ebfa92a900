"""Pages, plots and the model card: what people read of runs and evaluations."""
