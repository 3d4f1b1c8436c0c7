"""Memory and operations of a step before any weight is read. Nothing is measured here."""
