"""Code shared by both libraries: languages, label rules, paths, console. Imports nothing else of this project."""
