"""Feature extractors: networks that turn clips into features, loaded from files whose hashes are known."""
