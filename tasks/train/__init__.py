"""The train stage: latent shards in, a TRIP model folder out."""
