"""Training and measuring the shipped models."""
