"""NoveltyBench: how many different good answers a model gives."""
