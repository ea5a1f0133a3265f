"""The command line: one file a command, ``main`` holds the app."""
