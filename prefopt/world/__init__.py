"""A small controlled world: a grammar that writes short reviews, with a reward that is known exactly."""
