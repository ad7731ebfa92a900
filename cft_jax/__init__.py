"""Calibration Fine-Tuning: language models that sample from the distribution they are asked for (arXiv 2605.11845)."""

import os

# Before transformers is imported anywhere: its advice to install PyTorch helps nobody here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
