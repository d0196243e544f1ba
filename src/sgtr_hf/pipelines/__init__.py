"""The `scene-graph` pipeline."""
