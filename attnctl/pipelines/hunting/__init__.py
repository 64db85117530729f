"""HeadHunter: the search for heads that serve an aim."""
