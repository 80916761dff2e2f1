"""Programs on top of lpd_ext: training, token cache, evaluation and the `lpd` command line."""
