"""The command line, `vivit-hf`: one module per command."""
