"""What can be trained: each task brings model, data, loss and evaluation to the one loop."""
