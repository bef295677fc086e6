"""The command line, one module a command: each parses its arguments, calls one function and prints."""
