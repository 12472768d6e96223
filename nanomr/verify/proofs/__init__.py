"""Proofs and their checker, which shares no code with what found them."""
