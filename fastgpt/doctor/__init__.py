"""The doctor: reads a run's config, log and checkpoint, says what is wrong, what it costs and what to change."""
