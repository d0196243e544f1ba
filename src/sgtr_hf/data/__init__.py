"""Scene graph data: schema, synthetic scenes."""
