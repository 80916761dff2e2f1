"""Studies: how the quality of images depends on steps, orders, thresholds, guidance and mutual visibility."""
