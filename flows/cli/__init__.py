"""The commands: each flow, and what needs no flow; they run flows and are imported by none."""
