"""Models that aren't on this machine: on a hub or behind a URL, opened from their headers, fetched when a plan reads them."""
