"""What a model still knows: tinyBenchmarks and the tasks of lm-eval."""
