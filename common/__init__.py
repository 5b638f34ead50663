"""Code shared by all folders: configuration, errors, files, hashing, languages, label text, console."""
