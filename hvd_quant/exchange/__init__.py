"""Exchanges of payloads between ranks."""
