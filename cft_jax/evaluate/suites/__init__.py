"""The suites of the evaluation, a module or a package each; `registry` lists them."""
