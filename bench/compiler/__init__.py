"""What the compiler makes of kernels: resources, ranking, tuning tables. No GPU needed."""
