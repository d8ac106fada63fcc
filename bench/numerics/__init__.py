"""What reduced precision costs in accuracy, simulated on a CPU."""
