"""Texts and tasks to train and measure with, made on this machine from what is installed."""
