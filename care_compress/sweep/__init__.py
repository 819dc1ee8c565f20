"""Many recipes on an existing engine, Ray: which trials, where each runs, what came of all."""
