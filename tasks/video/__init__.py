"""Video decoding in separate processes: decodes only the needed frames and returns upright RGB pixels."""
