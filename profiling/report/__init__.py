"""One page of HTML of results: plots, tables and sentences."""
