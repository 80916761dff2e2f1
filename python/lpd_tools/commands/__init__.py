"""Commands of `lpd` that are more than one function call."""
