"""Payloads between ranks."""
