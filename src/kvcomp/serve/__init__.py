"""Values under keys, in a folder or Redis, for engines that serve."""
