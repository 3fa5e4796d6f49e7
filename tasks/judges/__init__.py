"""The judges: networks that look at frames, each under its honest name, loaded from files whose hash was checked."""
