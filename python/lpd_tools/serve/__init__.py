"""`lpd serve`: the engine behind the HTTP interface that image clients speak."""
