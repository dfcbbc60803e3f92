"""What is checked, set apart and said before an engine answers its first request."""
