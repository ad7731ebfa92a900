"""What a configuration would take on an accelerator, by that accelerator's own compiler, on any machine."""
