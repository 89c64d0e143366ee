"""The command line: parses arguments and calls one function. Installed as `minimind_cli`."""
