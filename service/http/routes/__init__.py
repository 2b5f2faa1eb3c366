"""One file for each family of routes; each offers a `router`."""
