"""Starts the processes of a run with torchrun or Accelerate. Imports neither PyTorch nor a batch system."""
