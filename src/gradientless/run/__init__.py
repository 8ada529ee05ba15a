"""Where the two wings meet: configuration, run folder, training, evaluation, reports."""
