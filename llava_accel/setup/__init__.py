"""What a run is made of before its first step: data, objective, feature cache, run folder. No step is taken here."""
