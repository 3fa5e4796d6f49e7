"""The serve stage: the model that an alias names answers over HTTP and on a page, through Ray Serve."""
