"""Looking inside backbones: sites, maps, what heads do."""
