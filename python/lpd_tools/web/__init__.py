"""`lpd demo`: a page on which pictures form and are painted over, for several people at once."""
