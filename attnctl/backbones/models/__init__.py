"""Whole models, registered with timm."""
