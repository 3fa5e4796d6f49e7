"""The prepare stage: every row of a table becomes latents in a shard, or a failure with a reason."""
