"""Exports in three forms, their verification, and uploads to the hub. Nothing is trained here."""
