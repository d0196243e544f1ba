"""Training with accelerate."""
