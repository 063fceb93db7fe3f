"""Raw text -> token ids. Imports nothing of the other rooms."""
