"""The block loop, the statistics it collects, and training."""
