"""The commands of `attnctl`, one file each. Nothing here imports torch before a command runs."""
