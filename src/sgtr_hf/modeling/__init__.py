"""Models: the detector, the predicate node generator, graph assembling."""
