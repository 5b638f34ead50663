"""What both libraries need: the names of languages, and the text that is a label. Imports nothing of this project."""
