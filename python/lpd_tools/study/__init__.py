"""The study: how the quality of images follows from steps, orders, thresholds, guidance and mutual visibility."""
