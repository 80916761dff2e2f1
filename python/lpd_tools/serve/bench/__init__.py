"""`lpd bench-serve`: measures the engine against the pipeline, and the server under overload and malformed requests."""
