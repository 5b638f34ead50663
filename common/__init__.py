"""What both libraries need: names of languages, rules of labels, the console. Imports nothing of this project."""
