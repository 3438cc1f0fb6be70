"""pymerge inside other programs, a module each, imported by whoever has that program."""
