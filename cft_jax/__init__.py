"""Calibration Fine-Tuning: language models that sample from the distribution they are asked for (arXiv 2605.11845)."""
