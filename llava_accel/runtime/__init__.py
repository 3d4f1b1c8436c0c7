"""The process that a run lives in: engines, launch profile, signals, clock, trackers. The only room that names an engine."""
