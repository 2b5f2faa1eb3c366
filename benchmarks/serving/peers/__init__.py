"""Other servers around the same purifier, to be measured beside this project's own."""
