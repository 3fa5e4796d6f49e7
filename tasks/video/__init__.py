"""Videos: decoded in processes of their own, only the frames that are needed, upright and in RGB."""
