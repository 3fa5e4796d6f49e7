"""The prepare stage: turns every row of a source into latents in a shard, or into a failure with a reason."""
