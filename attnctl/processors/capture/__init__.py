"""Word maps, and maps of points and concepts."""
