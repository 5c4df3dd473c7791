"""The command line: argument parser and the wrapper that every command shares."""
