"""`lpd bench-serve`: how fast the engine is beside the pipeline, and how the server bears load and nonsense."""
