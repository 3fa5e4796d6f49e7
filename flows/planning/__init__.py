"""The plan of a run before anything starts: memory, time, storage and cost, computed from the model itself."""
