"""The HTTP service and the command line: uploads in, purified classifications out."""
