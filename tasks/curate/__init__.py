"""The care of a finished data set: finding every fault in it, and removing clips that somebody asks to be removed."""
