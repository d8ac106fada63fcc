"""What people have (logs, configs, checkpoints, corpora) -> facts of the evidence."""
