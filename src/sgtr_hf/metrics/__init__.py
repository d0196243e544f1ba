"""Scene graph and detection metrics."""
