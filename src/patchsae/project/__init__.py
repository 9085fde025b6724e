"""What stands around a run: what is missing, what it costs, what is fetched, the rehearsal."""
