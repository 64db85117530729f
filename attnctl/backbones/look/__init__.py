"""Reading what backbones attend to: sites, maps, what heads do."""
