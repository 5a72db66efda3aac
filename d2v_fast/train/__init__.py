"""Pretraining: configs and presets, data, the training step and loop, logging."""
