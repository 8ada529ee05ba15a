"""Search methods over parameter space: they know tensors and no text."""
